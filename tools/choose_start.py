#!/usr/bin/env python3
"""megarewarm choose-start, from a checkout: python tools/choose_start.py --help"""

import find_megarewarm

if __name__ == "__main__":
    find_megarewarm.run("choose-start")
