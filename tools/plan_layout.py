#!/usr/bin/env python3
"""megarewarm plan, from a checkout: python tools/plan_layout.py --help"""

import find_megarewarm

if __name__ == "__main__":
    find_megarewarm.run("plan")
