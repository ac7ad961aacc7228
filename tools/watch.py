#!/usr/bin/env python3
"""Runs under way, live in the terminal: python tools/watch.py RUN_OR_EXPERIMENT [--once] [--every SECONDS]"""

from __future__ import annotations

import find_megarewarm  # noqa: F401  # isort: skip
import time
from pathlib import Path

from rich.console import Group
from rich.live import Live

from megarewarm.arguments import Parser
from megarewarm.console import make_console, only_ascii
from megarewarm.process import run
from megarewarm.report.live.frame import frame
from megarewarm.report.live.watch import RISE, Overview, Watch


def main() -> None:
    parser = Parser(description="Watch an experiment's runs, or one run, from the files they write.")
    parser.add_argument("folder", type=Path, metavar="RUN_OR_EXPERIMENT", help="folder of a run or of an experiment")
    parser.add_argument("--once", action="store_true", help="print one frame and end, as where the output is no terminal")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="time between two looks (default: 2)")
    parser.add_argument(
        "--rise", type=float, default=RISE, metavar="NATS", help=f"rise of the upstream loss that is an alarm (default: {RISE})"
    )
    parser.add_argument("--ascii", action="store_true", help="ASCII only, as where the terminal's encoding isn't UTF-8")
    arguments = parser.parse_args()
    if not arguments.every > 0:
        parser.error(f"--every {arguments.every:g}: give a number of seconds above 0")
    console = make_console(highlight=False)
    unicode = not (arguments.ascii or only_ascii(console))

    def shown(overview: Overview, height: int | None) -> Group:
        return Group(*frame(overview, console.width, height, unicode=unicode))

    watch = Watch(arguments.folder, rise=arguments.rise)
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
        pass  # the way out of it
    console.print(shown(overview, None))


if __name__ == "__main__":
    run(main)
