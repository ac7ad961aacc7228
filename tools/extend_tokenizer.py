#!/usr/bin/env python3
"""megarewarm extend-tokenizer, from a checkout: python tools/extend_tokenizer.py --help"""

import find_megarewarm

if __name__ == "__main__":
    find_megarewarm.run("extend-tokenizer")
