"""Run an experiment, several runs at a time: megarewarm sweep EXPERIMENT.yml [--launcher slurm] [--jobs N]

Shows the plan and its cost, then starts the runs that are not done. The same command resumes after an interruption.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence

from megarewarm.arguments import Parser
from megarewarm.errors import UserError
from megarewarm.process import importing


def command_line() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG | section.key=value", help="an experiment's YAML, then overrides")
    parser.add_argument("--launcher", choices=("local", "slurm"), default="local", help="where the runs are started")
    parser.add_argument(
        "--jobs", type=int, help="runs at a time; default: as many as fit on the GPUs, or into cores and memory"
    )
    parser.add_argument("--ranks", type=int, default=1, help="local: processes of each run, one GPU each if there are GPUs")
    parser.add_argument(
        "--sbatch", default="", metavar="OPTIONS", help="slurm: options for sbatch, such as '--gpus-per-node 1'"
    )
    parser.add_argument("--quick", action="store_true", help="run the reduced experiment that the file defines under 'quick'")
    parser.add_argument("--only", action="append", default=[], metavar="RUN", help="only this run, or arm with all its seeds")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and its cost, start nothing")
    parser.add_argument("--allow-missing", action="store_true", help="with --dry-run: list missing files instead of failing")
    return parser


def main(words: Sequence[str]) -> int:
    parser = command_line()
    arguments = parser.parse_intermixed_args(words)
    with importing():
        from megarewarm.config.experiment import is_experiment, load_experiment
        from megarewarm.config.load import read_configs
        from megarewarm.console import make_console

    if arguments.allow_missing and not arguments.dry_run:
        parser.error("--allow-missing works only with --dry-run: runs need their files")
    console = make_console()
    for name in ("jobs", "ranks"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name} {value}: expected a number above 0")
    mapping, origins = read_configs(arguments.configs)
    if not is_experiment(mapping):
        raise UserError(f"{arguments.configs[0]}: a single run (no key 'experiment'); start it with megarewarm train")
    experiment = load_experiment(mapping, origins, quick=arguments.quick)
    with importing():
        from megarewarm.lab.sweep import sweep

    words = [*arguments.configs, *(["--quick"] if arguments.quick else [])]
    return sweep(
        experiment,
        words,
        console,
        launcher=arguments.launcher,
        jobs=arguments.jobs,
        ranks=arguments.ranks,
        options=shlex.split(arguments.sbatch),
        only=arguments.only,
        dry_run=arguments.dry_run,
        allow_missing=arguments.allow_missing,
        environment=dict(os.environ),
    )
