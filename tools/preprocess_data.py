#!/usr/bin/env python3
"""megarewarm prepare, from a checkout: python tools/preprocess_data.py --help"""

import find_megarewarm

if __name__ == "__main__":
    find_megarewarm.run("prepare")
