#!/usr/bin/env python3
"""megarewarm score-data, from a checkout: python tools/score_data.py --help"""

import find_megarewarm

if __name__ == "__main__":
    find_megarewarm.run("score-data")
