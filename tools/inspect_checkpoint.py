#!/usr/bin/env python3
"""megarewarm inspect, from a checkout: python tools/inspect_checkpoint.py --help"""

import find_megarewarm

if __name__ == "__main__":
    find_megarewarm.run("inspect")
