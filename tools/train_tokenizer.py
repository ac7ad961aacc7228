#!/usr/bin/env python3
"""megarewarm tokenizer, from a checkout: python tools/train_tokenizer.py --help"""

import find_megarewarm

if __name__ == "__main__":
    find_megarewarm.run("tokenizer")
