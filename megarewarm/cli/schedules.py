"""Draw all learning-rate curves into one picture: megarewarm schedules [docs/schedules.png]"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megarewarm.arguments import Parser
from megarewarm.process import importing


def command_line() -> Parser:
    parser = Parser(description="Draw all learning-rate curves into one picture.")
    parser.add_argument("picture", nargs="?", type=Path, default=Path("docs/schedules.png"), help="default: %(default)s")
    return parser


def main(words: Sequence[str]) -> None:
    parser = command_line()
    picture = parser.parse_args(words).picture
    with importing():
        from megarewarm.report.figures.schedules import draw_gallery

    draw_gallery(picture)
    print(picture)
