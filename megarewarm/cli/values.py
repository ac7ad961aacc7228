"""What training rows did to validation losses: megarewarm values RUN [--against SET ...] [--rows 5] [--select FOLDER]

Of a run with 'valuation': a table of its sources, RUN/values.png, and the rows with the highest and lowest values as text.
--select FOLDER writes, for each training source, a list of the documents that stay when the harmful ones are dropped; the
token files stay as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megarewarm.arguments import Parser
from megarewarm.errors import UserError
from megarewarm.process import importing, say


def command_line() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument("--against", nargs="+", default=[], metavar="SET", help="validation sets; default: all")
    parser.add_argument(
        "--rows", type=int, default=3, metavar="K", help="highest and lowest rows to show; default: %(default)s"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="where the picture goes; default: RUN/values.png")
    parser.add_argument(
        "--select", type=Path, metavar="FOLDER", help="write lists of the documents that stay, into a new folder"
    )
    parser.add_argument("--drop", choices=("harmful",), default="harmful", help="what --select drops; default: %(default)s")
    parser.add_argument(
        "--by",
        choices=("source", "document"),
        default="source",
        help="what is harmful as a whole: sources below zero by two standard errors, or documents; default: %(default)s",
    )
    return parser


def main(words: Sequence[str]) -> None:
    parser = command_line()
    arguments = parser.parse_args(words)
    with importing():
        from megarewarm.config.load import read_run_config
        from megarewarm.console import make_console
        from megarewarm.lab.values import check_sets, select, show_extremes, show_selection, show_values
        from megarewarm.record.run import read_run
        from megarewarm.record.values import Values
        from megarewarm.report.figures.values import draw_values

    folder: Path = arguments.run
    config, run, values = read_run_config(folder), read_run(folder), Values(folder)
    against, console = check_sets(values, arguments.against), make_console()
    selections = select(values, config, against, arguments.by, arguments.select, say) if arguments.select is not None else []
    show_values(values, run, against, console)
    if arguments.rows > 0:
        show_extremes(values, config, against, arguments.rows, console)
    picture = arguments.picture or folder / "values.png"
    figure = draw_values([(run.name, run)])
    if figure is not None:
        try:
            figure.savefig(picture, dpi=160)
        except (OSError, ValueError) as error:
            raise UserError(f"{picture}: can't be written ({error})") from error
        console.print(f"\npicture: {picture}", highlight=False)
    if selections:
        show_selection(selections, config, console)
