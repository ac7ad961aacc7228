#!/usr/bin/env python3
"""megarewarm values, from a checkout: python tools/merge_data.py --help"""

import find_megarewarm

if __name__ == "__main__":
    find_megarewarm.run("values")
