"""Continue a text with a checkpoint: megarewarm generate CHECKPOINT "Once upon a time" [--max-tokens N]"""

from __future__ import annotations

from collections.abc import Sequence

from megarewarm.arguments import Parser, path_text
from megarewarm.process import importing


def command_line() -> Parser:
    parser = Parser(description="Continue a text with a run's model or any checkpoint that start.from takes.")
    parser.add_argument("checkpoint", type=path_text, help="folder or hub name, as for start.from")
    parser.add_argument("text", help="text to continue")
    parser.add_argument("--max-tokens", type=int, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: the most likely token each time; default: %(default)s"
    )
    parser.add_argument("--top-p", type=float, default=0.95, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    return parser


def main(words: Sequence[str]) -> None:
    arguments = command_line().parse_args(words)
    with importing():
        from megarewarm.api import load_model

    model = load_model(arguments.checkpoint, device=arguments.device)
    new = model.generate(
        arguments.text, arguments.max_tokens, temperature=arguments.temperature, top_p=arguments.top_p, seed=arguments.seed
    )
    print(arguments.text + new)
