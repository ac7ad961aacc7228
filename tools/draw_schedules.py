#!/usr/bin/env python3
"""megarewarm schedules, from a checkout: python tools/draw_schedules.py --help"""

import find_megarewarm

if __name__ == "__main__":
    find_megarewarm.run("schedules")
