#!/usr/bin/env python3
"""megarewarm report, from a checkout: python tools/report.py --help"""

import find_megarewarm

if __name__ == "__main__":
    find_megarewarm.run("report")
