#!/usr/bin/env python3
"""megarewarm advise, from a checkout: python tools/advise.py --help"""

import find_megarewarm

if __name__ == "__main__":
    find_megarewarm.run("advise")
