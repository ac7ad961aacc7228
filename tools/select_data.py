#!/usr/bin/env python3
"""megarewarm select-data, from a checkout: python tools/select_data.py --help"""

import find_megarewarm

if __name__ == "__main__":
    find_megarewarm.run("select-data")
