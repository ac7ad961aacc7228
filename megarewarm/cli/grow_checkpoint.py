"""Grow a checkpoint into a wider or deeper model: megarewarm grow SRC DST [--width 2] [--layers 24]

    megarewarm grow SRC DST --width 2 --noise 10dB                 twice as wide, the same function; copies part in training
    megarewarm grow SRC DST --layers 24                            new layers that add nothing yet, the same function
    megarewarm grow SRC DST --layers 24 --depth stack              all layers again; the logits move
    megarewarm grow SRC DST --width 4/3 --method fpi               any factor that heads and channels take; the logits move

It prints how far the logits moved, and writes nothing where they should not have. The result has weights only, of fp32:
continue training from it (start.from), where its history lets replay go on. One parameter is in memory at a time, and one
layer while the logits are compared.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from megarewarm.arguments import DEEPENINGS, FORMS, WIDENINGS, Parser, count, path_text, seed
from megarewarm.errors import UserError
from megarewarm.process import importing


def command_line() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=path_text, metavar="SRC", help="folder or hub name, as for start.from")
    parser.add_argument("destination", metavar="DST", type=Path, help="a new folder")
    parser.add_argument("--width", type=_factor, metavar="FACTOR", help="of channels, heads and neurons: 2, 1.5, 4/3")
    parser.add_argument("--method", choices=WIDENINGS, help="of --width; default: clone")
    parser.add_argument("--noise", type=_decibels, metavar="dB", help="of copies, such as 10dB, so that they part; cancels")
    parser.add_argument("--layers", type=count, metavar="N", help="layers of the grown model")
    parser.add_argument("--depth", choices=DEEPENINGS, help="of --layers; default: identity")
    parser.add_argument("--seed", type=seed, default=0, help="of noise, fpi and aki; default: %(default)s")
    parser.add_argument("--on", type=path_text, metavar="PREFIX", help="token file to compare logits on; default: random ids")
    parser.add_argument("--tokens", type=count, default=1024, metavar="N", help="to compare on; default: %(default)s")
    parser.add_argument("--to", choices=FORMS, default="megarewarm", help="default: %(default)s")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json, or a folder with one; default: what SRC comes with"
    )
    return parser


def main(words: Sequence[str]) -> None:
    arguments = command_line().parse_args(words)
    for option, needed in (("method", "width"), ("depth", "layers")):
        if getattr(arguments, option) and not getattr(arguments, needed):
            raise UserError(f"--{option} {getattr(arguments, option)}: nothing without --{needed}; give both")
    with importing():
        from megarewarm.checkpoint.compare_logits import sample_tokens
        from megarewarm.checkpoint.convert import ConvertOptions
        from megarewarm.checkpoint.grow import Growth, bytes_to_read, grow
        from megarewarm.checkpoint.progress import reading
        from megarewarm.checkpoint.source import open_checkpoint
        from megarewarm.console import make_console

    console = make_console()
    source = open_checkpoint(arguments.source)
    for note in source.notes:
        console.print(f"{source.name}: {note}", highlight=False)
    growth = Growth(
        arguments.width or Fraction(1),
        arguments.method or "clone",
        arguments.noise,
        arguments.layers,
        arguments.depth or "identity",
        arguments.seed,
    )
    total = bytes_to_read(source, growth)
    tokens = sample_tokens(arguments.on, source.model_config, arguments.tokens, arguments.seed)
    options = ConvertOptions(arguments.to, tokenizer=arguments.tokenizer)
    with reading(console, "comparing and writing", total) as advance:
        difference, notes = grow(source, arguments.destination, growth, options, tokens, advance)
    kept = (
        "the function is preserved" if growth.preserves(source.model_config) else "this growth does not preserve the function"
    )
    lines = [growth.description(source.model_config), f"{difference.line()}: {kept}", *notes]
    if source.training is not None:
        lines.append("weights only: moments of another shape can't be kept, so a run from it begins with new ones")
    for line in lines:
        console.print(f"{arguments.destination}: {line}", highlight=False)


def _factor(text: str) -> Fraction:
    """'2', '1.5' or '4/3', for ``argparse``."""
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"'{text}' is not a factor, such as 2, 1.5 or 4/3") from None


def _decibels(text: str) -> float:
    """'10dB' or '10', for ``argparse``."""
    try:
        value = float(text.strip().lower().removesuffix("db"))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a ratio of signal to noise, such as 10dB")
    return value
