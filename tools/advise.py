#!/usr/bin/env python3
"""Laws fitted to an experiment's runs: python tools/advise.py EXPERIMENT_FOLDER [--upstream-within 2%] [--output FOLDER]"""

from __future__ import annotations

import find_megarewarm  # noqa: F401  # isort: skip
import argparse
import sys

import orjson
from rich.console import Console

from megarewarm.config.paths import path_argument
from megarewarm.errors import EXIT_BAD_INPUT, UserError


def share(text: str) -> float:
    """'2%' or '0.02' -> 0.02."""
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Fit published laws to the finished runs of an experiment, and predict schedules and replay fractions that "
        "were not tried."
    )
    parser.add_argument("experiment", type=path_argument, metavar="EXPERIMENT_FOLDER", help="folder with experiment.json in it")
    parser.add_argument(
        "--upstream-within",
        type=share,
        default=0.02,
        metavar="SHARE",
        help="by how much of its start value the upstream loss may rise (default: 2%%)",
    )
    parser.add_argument("--output", type=path_argument, help="for advice.json, advice.png; default: EXPERIMENT_FOLDER/advice")
    arguments = parser.parse_args()
    try:
        import scipy  # noqa: F401
    except ModuleNotFoundError:
        print("advise.py: the scipy package is not installed; pip install scipy", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    from megarewarm.laws.advice import advise, as_json
    from megarewarm.laws.show import draw_advice, print_advice

    try:
        advice = advise(arguments.experiment, arguments.upstream_within)
        output = arguments.output or arguments.experiment / "advice"
        try:
            output.mkdir(parents=True, exist_ok=True)
            (output / "advice.json").write_bytes(orjson.dumps(as_json(advice), option=orjson.OPT_INDENT_2) + b"\n")
            drawn = draw_advice(advice, output / "advice.png")
        except OSError as error:
            raise UserError(f"{output}: can't be written ({error.strerror or error}): give another --output") from error
        print_advice(advice, Console())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    print(output / "advice.json", *([output / "advice.png"] if drawn else []))


if __name__ == "__main__":
    main()
