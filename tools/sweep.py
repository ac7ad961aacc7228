#!/usr/bin/env python3
"""megarewarm sweep, from a checkout: python tools/sweep.py --help"""

import find_megarewarm

if __name__ == "__main__":
    find_megarewarm.run("sweep")
