#!/usr/bin/env python3
"""megarewarm generate, from a checkout: python tools/generate.py --help"""

import find_megarewarm

if __name__ == "__main__":
    find_megarewarm.run("generate")
