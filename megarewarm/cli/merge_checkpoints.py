"""Average the weights of checkpoints, one parameter at a time.

    megarewarm merge OUT --last 5 runs/mine                      mean of a run's five newest checkpoints
    megarewarm merge OUT --mean A B C                            mean of any checkpoints
    megarewarm merge OUT --ema 0.8 A B C                         moving average, oldest first
    megarewarm merge OUT --like minus_sqrt runs/mine --window 10%    a decay over the last tenth of a run at a constant rate
    megarewarm merge OUT --interpolate START END --alpha 0.25 0.5 0.75

Several alphas give OUT_0.25, OUT_0.5, ... The result has weights only: inspect it with megarewarm inspect, continue
training from it (start.intent rewarm), or write it for transformers (--to hf).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megarewarm.arguments import DTYPES, FORMS, Parser, path_text
from megarewarm.errors import UserError
from megarewarm.process import importing

if TYPE_CHECKING:
    from megarewarm.checkpoint.merge import Merge


def command_line() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("destination", metavar="OUT", type=Path)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--mean", type=path_text, nargs="+", metavar="CHECKPOINT")
    how.add_argument("--last", type=path_text, nargs=2, metavar=("K", "RUN"))
    how.add_argument("--ema", type=path_text, nargs="+", metavar="DECAY CHECKPOINT")
    how.add_argument("--interpolate", type=path_text, nargs=2, metavar=("START", "END"))
    how.add_argument("--like", type=path_text, nargs="+", metavar="SHAPE RUN", help="linear, cosine, exponential, minus_sqrt")
    parser.add_argument(
        "--window", metavar="LENGTH", help="of --like: the end of the run that decays, such as 10%% or '2B tokens'"
    )
    parser.add_argument("--alpha", nargs="+", type=float, default=[0.5], help="shares of END; default: 0.5")
    parser.add_argument("--to", choices=FORMS, default="megarewarm", help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, help="for hf and neox; default: fp32")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json, or a folder with one; default: the first checkpoint's"
    )
    return parser


def main(words: Sequence[str]) -> None:
    parser = command_line()
    arguments = parser.parse_args(words)
    with importing():
        from megarewarm.checkpoint import convert
        from megarewarm.checkpoint.merge import bytes_to_read, merge
        from megarewarm.checkpoint.progress import reading
        from megarewarm.console import make_console

    console = make_console()
    for alpha in arguments.alpha if arguments.interpolate else ():
        if not math.isfinite(alpha):
            raise UserError(f"--alpha {alpha}: expected a finite number, the share of END")
        if not 0 <= alpha <= 1:
            console.print(
                f"--alpha {alpha:g} is outside [0, 1], beyond START or END: {1 - alpha:g} x START + {alpha:g} x END",
                style="yellow",
                highlight=False,
            )
    options = convert.ConvertOptions(
        arguments.to, convert.DTYPES[arguments.dtype] if arguments.dtype else None, tokenizer=arguments.tokenizer
    )
    for merged, destination in _merges(arguments):
        with reading(console, destination.name, bytes_to_read(merged)) as advance:
            notes = merge(merged, destination, options, advance)
        console.print(f"{destination}: {merged.description}", highlight=False)
        if merged.note:
            console.print(f"{destination}: {merged.note}", style="yellow", highlight=False)
        for note in notes:
            console.print(f"{destination}: {note}", highlight=False)


def _merges(arguments: argparse.Namespace) -> list[tuple[Merge, Path]]:
    from megarewarm.checkpoint.merge import Merge, ema_shares, interpolation_shares, last_of, mean_shares

    out: Path = arguments.destination
    if arguments.window and not arguments.like:
        raise UserError("--window: is the length of the decay that --like stands for; remove it, or give --like")
    if arguments.interpolate:
        several = len(arguments.alpha) > 1
        return [
            (
                Merge(arguments.interpolate, interpolation_shares(a), f"interpolation at {a:g}"),
                Path(f"{out}_{a:g}") if several else out,
            )
            for a in arguments.alpha
        ]
    if arguments.ema:
        decay, names = arguments.ema[0], arguments.ema[1:]
        try:
            shares = ema_shares(len(names), float(decay))
        except ValueError:
            raise UserError(f"--ema {decay}: the decay comes first, a number in [0, 1), then the checkpoints") from None
        return [(Merge(names, shares, f"moving average with decay {decay}"), out)]
    if arguments.like:
        return [(_like_decay(arguments.like, arguments.window), out)]
    names = last_of(*arguments.last) if arguments.last else arguments.mean
    return [(Merge(names, mean_shares(len(names)), f"mean of {len(names)}"), out)]


def _like_decay(words: Sequence[str], window: str | None) -> Merge:
    from pydantic import ValidationError

    from megarewarm.checkpoint.merge import decay_like
    from megarewarm.config.budget import Budget
    from megarewarm.schedules.curves import WSD_DECAYS

    shape, *names = words
    if shape not in WSD_DECAYS or not names:
        raise UserError(f"--like {shape}: the shape comes first ({', '.join(WSD_DECAYS)}), then a run's folder or checkpoints")
    try:
        return decay_like(shape, names, Budget.model_validate(window) if window is not None else None)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"--window {window}: {reason}") from None
