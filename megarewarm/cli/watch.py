"""Follow runs live in the terminal: megarewarm watch RUN_OR_EXPERIMENT [--once] [--every SECONDS]"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from megarewarm.arguments import Parser
from megarewarm.process import importing


def command_line() -> Parser:
    parser = Parser(description="Watch an experiment's runs, or one run, from the files they write.")
    parser.add_argument("folder", type=Path, metavar="RUN_OR_EXPERIMENT", help="folder of a run or of an experiment")
    parser.add_argument(
        "--once", action="store_true", help="print one frame and exit; the default if the output is not a terminal"
    )
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="time between updates (default: 2)")
    parser.add_argument(
        "--rise",
        type=float,
        metavar="NATS",
        help="rise of the upstream loss that raises an alarm (default: above what published re-warmings show)",
    )
    parser.add_argument("--ascii", action="store_true", help="ASCII only; the default if the terminal's encoding isn't UTF-8")
    return parser


def main(words: Sequence[str]) -> None:
    parser = command_line()
    arguments = parser.parse_args(words)
    with importing():
        from rich.console import Group
        from rich.live import Live

        from megarewarm.console import make_console, only_ascii
        from megarewarm.report.live.frame import frame
        from megarewarm.report.live.watch import RISE, Overview, Watch

    if not arguments.every > 0:
        parser.error(f"--every {arguments.every:g}: give a number of seconds above 0")
    console = make_console(highlight=False)
    unicode = not (arguments.ascii or only_ascii(console))

    def shown(overview: Overview, height: int | None) -> Group:
        return Group(*frame(overview, console.width, height, unicode=unicode))

    watch = Watch(arguments.folder, rise=RISE if arguments.rise is None else arguments.rise)
    if arguments.once or not console.is_terminal:
        console.print(shown(watch.look(), None))
        return
    overview = watch.look()
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(shown(overview, console.height - 1), refresh=True)
                time.sleep(arguments.every)
                overview = watch.look()
    except KeyboardInterrupt:
        pass  # Ctrl-C ends the live view
    console.print(shown(overview, None))
