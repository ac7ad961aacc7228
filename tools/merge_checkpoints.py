#!/usr/bin/env python3
"""megarewarm merge, from a checkout: python tools/merge_checkpoints.py --help"""

import find_megarewarm

if __name__ == "__main__":
    find_megarewarm.run("merge")
