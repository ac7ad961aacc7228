#!/usr/bin/env python3
"""megarewarm replay-step, from a checkout: python tools/replay_batch.py --help"""

import find_megarewarm

if __name__ == "__main__":
    find_megarewarm.run("replay-step")
