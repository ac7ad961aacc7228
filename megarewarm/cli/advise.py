"""What next, after an experiment: megarewarm advise EXPERIMENT_FOLDER [--upstream-within 2%] [--all] [--output FOLDER]"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megarewarm.arguments import Parser, share
from megarewarm.errors import UserError
from megarewarm.process import importing


def command_line() -> Parser:
    parser = Parser(
        description="Say which arm of an experiment is best, and which run is worth trying next. Fits published laws to "
        "the finished runs; they predict only values between those tried."
    )
    parser.add_argument("experiment", type=Path, metavar="EXPERIMENT_FOLDER", help="folder with experiment.json in it")
    parser.add_argument(
        "--upstream-within",
        type=share,
        default=0.02,
        metavar="SHARE",
        help="by how much of its start value the upstream loss may rise (default: 2%%)",
    )
    parser.add_argument("--all", action="store_true", help="also show the laws and how well they predicted held-out levels")
    parser.add_argument("--output", type=Path, help="for advice.json and advice.png; default: EXPERIMENT_FOLDER/advice")
    return parser


def main(words: Sequence[str]) -> None:
    parser = command_line()
    arguments = parser.parse_args(words)
    with importing():
        import orjson

        from megarewarm.console import make_console
        from megarewarm.laws.advice import advise, as_json
        from megarewarm.laws.show import draw_advice
        from megarewarm.laws.tell import print_advice

    with make_console(stderr=True).status("reading") as status:
        advice = advise(arguments.experiment, arguments.upstream_within, status.update)
    output = arguments.output or arguments.experiment / "advice"
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "advice.json").write_bytes(orjson.dumps(as_json(advice), option=orjson.OPT_INDENT_2) + b"\n")
        drawn = draw_advice(advice, output / "advice.png")
    except OSError as error:
        raise UserError(f"{output}: can't be written ({error.strerror or error}): give another --output") from error
    print_advice(advice, make_console(), arguments.all)
    print(output / "advice.json", *([output / "advice.png"] if drawn else []))
