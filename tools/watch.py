#!/usr/bin/env python3
"""megarewarm watch, from a checkout: python tools/watch.py --help"""

import find_megarewarm

if __name__ == "__main__":
    find_megarewarm.run("watch")
