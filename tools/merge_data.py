#!/usr/bin/env python3
"""megarewarm merge-data, from a checkout: python tools/merge_data.py --help"""

import find_megarewarm

if __name__ == "__main__":
    find_megarewarm.run("merge-data")
