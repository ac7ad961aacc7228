"""Choose the checkpoint to start from: megarewarm choose-start CHECKPOINT ... --on PREFIX

    megarewarm choose-start runs/upstream@* --on data/new_valid --and data/pile_validation
    megarewarm choose-start runs/upstream@* hf --on data/new_valid --probe 200 steps --with RUN.yml

One table and one picture: losses of each candidate on the same tokens, LogME on next tokens (arXiv 2102.11005), and how far
the learning rate of each had decayed. --probe also makes a short run from each, and says which score orders them as their
losses afterwards do. RUN@* is every checkpoint of a run, RUN@20% one of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megarewarm.arguments import Parser, count, path_text, seed, tokens
from megarewarm.errors import UserError
from megarewarm.process import importing


def command_line() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=path_text, nargs="+", metavar="CHECKPOINT", help="as for start.from, or RUN@*")
    parser.add_argument("--on", type=path_text, required=True, metavar="PREFIX", help="held-out tokens of the new data")
    parser.add_argument("--and", type=path_text, nargs="+", default=[], dest="also", metavar="PREFIX", help="such as old data")
    parser.add_argument("--tokens", type=tokens, default=2**18, metavar="N", help="at most, of each file; default: 262144")
    parser.add_argument("--sequence-length", type=count, metavar="S", help="default: all positions that all candidates have")
    parser.add_argument("--micro-batch", type=count, default=4, metavar="B", help="sequences at a time; default: %(default)s")
    parser.add_argument("--positions", type=count, default=2**14, metavar="N", help="of LogME, at most; default: %(default)s")
    parser.add_argument("--classes", type=count, default=128, metavar="C", help="commonest next tokens; default: %(default)s")
    parser.add_argument("--seed", type=seed, default=1, help="of the choice of positions; default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument("--probe", nargs="+", metavar="LENGTH", help="of a short run from each: 200 steps, or '2M tokens'")
    parser.add_argument("--with", nargs="+", default=[], dest="config", metavar="CONFIG | key=value", help="their run file")
    parser.add_argument("--jobs", type=count, help="probe runs at a time; default: as many as fit")
    parser.add_argument("--output", type=Path, default=Path("runs/choose_start"), metavar="FOLDER", help="default: %(default)s")
    return parser


def main(words: Sequence[str]) -> int:
    arguments = command_line().parse_args(words)
    with importing():
        from pydantic import ValidationError

        from megarewarm.config.budget import Budget
        from megarewarm.console import make_console
        from megarewarm.lab.choose_start import Settings, choose_start

    probe = " ".join(arguments.probe) if arguments.probe else None
    try:
        length = Budget.model_validate(probe) if probe is not None else None
    except ValidationError as error:
        raise UserError(f"--probe {probe}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    if length is not None and (length.unit not in ("steps", "tokens") or length.amount < 1):
        raise UserError(f"--probe {probe}: expected a length such as '200 steps' or '2M tokens'")
    settings = Settings(
        arguments.on,
        arguments.also,
        arguments.tokens,
        arguments.output,
        sequence_length=arguments.sequence_length,
        micro_batch=arguments.micro_batch,
        positions=arguments.positions,
        classes=arguments.classes,
        seed=arguments.seed,
        device=arguments.device,
        probe=length,
        config=arguments.config,
        jobs=arguments.jobs,
    )
    return choose_start(arguments.checkpoints, settings, make_console())
