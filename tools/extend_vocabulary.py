#!/usr/bin/env python3
"""megarewarm extend-vocabulary, from a checkout: python tools/extend_vocabulary.py --help"""

import find_megarewarm

if __name__ == "__main__":
    find_megarewarm.run("extend-vocabulary")
