#!/usr/bin/env python3
"""megarewarm grow, from a checkout: python tools/grow_checkpoint.py --help"""

import find_megarewarm

if __name__ == "__main__":
    find_megarewarm.run("grow")
