"""Recompute one step of a run to inspect it: megarewarm replay-step RUN [--step N] [--rows 12] [--out FILE.json]

Without --step, takes the newest step that went wrong (RUN/batches), else the last. The run is not changed. A run of several
ranks needs as many here: torchrun --nproc-per-node 4 -m megarewarm replay-step RUN --step N
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megarewarm.arguments import Parser
from megarewarm.errors import UserError
from megarewarm.parallel.meeting_place import launch_of_process
from megarewarm.process import importing, say


def command_line() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument("--step", type=int, metavar="N", help="the step, counted from 1")
    parser.add_argument("--rows", type=int, default=12, metavar="K", help="sequences to show; default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON, with the text of all sequences")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    return parser


def main(words: Sequence[str]) -> int:
    parser = command_line()
    arguments = parser.parse_args(words)
    launch = launch_of_process()
    with importing():
        from megarewarm.console import make_bar, make_console
        from megarewarm.lab.replay_step import replay_step, show
        from megarewarm.parallel.connect import connect

    console = make_console(quiet=launch.rank != 0)
    try:
        ranks = connect(launch, arguments.device, 30.0)
        try:
            with make_bar(console) as bar:
                task = bar.add_task("retraining the steps before", total=None)
                replayed = replay_step(
                    arguments.run,
                    arguments.step,
                    ranks,
                    lambda step, first, last: bar.update(task, completed=step - first, total=last - first),
                )
        finally:
            ranks.close()
    except UserError as error:
        if launch.rank == 0:
            say(str(error))
        return error.exit_code
    show(replayed, console, arguments.rows)
    if arguments.out is not None and ranks.is_main:
        try:
            arguments.out.write_text(json.dumps(replayed.as_json(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{arguments.out}: can't be written ({error.strerror or error})") from error
        console.print(f"written: {arguments.out}", highlight=False)
    return 0
