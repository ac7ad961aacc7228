"""Continue texts with a checkpoint: megarewarm generate CHECKPOINT "Once upon a time" [TEXT ...] [--max-tokens N]"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from megarewarm.arguments import Parser, count, path_text, seed
from megarewarm.process import importing


def command_line() -> Parser:
    parser = Parser(
        description="Continue texts with a run's newest checkpoint, also while it trains, or any that start.from takes."
    )
    parser.add_argument("checkpoint", type=path_text, help="folder or hub name, as for start.from")
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="text to continue; several are continued at once")
    parser.add_argument("--max-tokens", type=count, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=_temperature, default=0.8, help="0: the most likely token each time; default: %(default)s"
    )
    parser.add_argument(
        "--top-p",
        type=_top_p,
        default=0.95,
        help="share of the probability that the likeliest tokens which are left hold; default: %(default)s",
    )
    parser.add_argument("--seed", type=seed, default=0, help="default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    return parser


def _temperature(text: str) -> float:
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is neither 0 (the most likely token each time) nor a number above 0")
    return float(text)


def _top_p(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a share above 0, at most 1")
    return float(text)


def main(words: Sequence[str]) -> None:
    arguments = command_line().parse_args(words)
    with importing():
        from megarewarm.api import load_model

    model = load_model(arguments.checkpoint, device=arguments.device)
    found = model.generate(
        arguments.texts,
        arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    for number, (text, new) in enumerate(zip(arguments.texts, found, strict=True)):
        print("---\n" * bool(number) + text + new)
