#!/usr/bin/env python3
"""Compute one step of a run again, to look at it: python tools/replay_batch.py RUN [--step N] [--rows 12] [--out FILE.json]

Without --step the newest step that went wrong (RUN/batches), else the last. Nothing of the run changes. A run of several ranks
is computed by as many: torchrun --nproc-per-node 4 tools/replay_batch.py RUN --step N
"""

from __future__ import annotations

import find_megarewarm  # noqa: F401  # isort: skip
import argparse
import json
import os
import sys

from rich.console import Console
from rich.progress import Progress

from megarewarm.config.paths import path_argument
from megarewarm.errors import EXIT_BAD_INPUT, UserError
from megarewarm.parallel.connect import connect
from megarewarm.parallel.launchers import read_launcher
from megarewarm.training.replay_batch import replay_step, show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=path_argument, metavar="RUN", help="the folder of a run")
    parser.add_argument("--step", type=int, metavar="N", help="the step, counted from 1")
    parser.add_argument("--rows", type=int, default=12, metavar="K", help="sequences that are shown; default: %(default)s")
    parser.add_argument("--out", type=path_argument, metavar="FILE", help="write everything as JSON, all sequences as text")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    arguments = parser.parse_args()
    launch = None
    try:
        launch = read_launcher(os.environ)
        console = Console(quiet=launch.rank != 0, soft_wrap=not sys.stdout.isatty())
        ranks = connect(launch, arguments.device, 30.0)
        try:
            with Progress(*Progress.get_default_columns(), console=console, transient=True) as bar:
                task = bar.add_task("steps before it", total=None)
                replayed = replay_step(
                    arguments.run,
                    arguments.step,
                    ranks,
                    lambda step, first, last: bar.update(task, completed=step - first, total=last - first),
                )
        finally:
            ranks.close()
        show(replayed, console, arguments.rows)
        if arguments.out is not None and ranks.is_main:
            arguments.out.write_text(json.dumps(replayed.as_json(), indent=1) + "\n", encoding="utf-8")
            console.print(f"written: {arguments.out}", highlight=False)
    except OSError as error:
        print(f"{arguments.out}: can't be written ({error.strerror or error})", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except UserError as error:
        if launch is None or launch.rank == 0:
            print(error, file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    main()
