#!/usr/bin/env python3
"""megarewarm convert, from a checkout: python tools/convert_checkpoint.py --help"""

import find_megarewarm

if __name__ == "__main__":
    find_megarewarm.run("convert")
