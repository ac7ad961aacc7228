"""Draw all learning-rate curves into one picture: megarewarm schedules [schedules.png]"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megarewarm.arguments import Parser
from megarewarm.errors import UserError
from megarewarm.process import importing


def command_line() -> Parser:
    parser = Parser(description="Draw all learning-rate curves into one picture.")
    parser.add_argument("picture", nargs="?", type=Path, default=Path("schedules.png"), help="a .png; default: %(default)s")
    return parser


def main(words: Sequence[str]) -> None:
    picture = command_line().parse_args(words).picture
    with importing():
        from megarewarm.report.figures.schedules import draw_gallery

    if picture.suffix != ".png" or picture.is_dir():
        raise UserError(f"{picture}: expected the name of a picture, such as schedules.png")
    draw_gallery(picture)
    print(picture)
