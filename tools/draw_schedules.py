#!/usr/bin/env python3
"""Draw every learning-rate curve into one picture: python tools/draw_schedules.py [docs/schedules.png]"""

from __future__ import annotations

import find_megarewarm  # noqa: F401  # isort: skip
from pathlib import Path

from megarewarm.arguments import Parser
from megarewarm.process import run
from megarewarm.report.figures.schedules import draw_gallery


def main() -> None:
    parser = Parser(description="Draw every learning-rate curve into one picture.")
    parser.add_argument("picture", nargs="?", type=Path, default=Path("docs/schedules.png"), help="default: %(default)s")
    picture = parser.parse_args().picture
    draw_gallery(picture)
    print(picture)


if __name__ == "__main__":
    run(main)
