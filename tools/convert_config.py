#!/usr/bin/env python3
"""megarewarm convert-config, from a checkout: python tools/convert_config.py --help"""

import find_megarewarm

if __name__ == "__main__":
    find_megarewarm.run("convert-config")
