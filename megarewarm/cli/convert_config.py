"""Convert GPT-NeoX files to a megarewarm config: megarewarm convert-config 410M.yml local_setup.yml --output run.yml"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megarewarm.arguments import Parser
from megarewarm.errors import UserError
from megarewarm.process import importing


def command_line() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="GPT-NeoX files, merged as in GPT-NeoX")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    parser.add_argument("--ranks", type=int, help="ranks of the run, for the global batch; default: as few as the files need")
    return parser


def main(words: Sequence[str]) -> None:
    parser = command_line()
    arguments = parser.parse_args(words)
    with importing():
        from megarewarm.config.load import dump
        from megarewarm.config.neox_read import neox_files
        from megarewarm.console import make_console
        from megarewarm.rewarm.neox_start import load_neox, show_account

    files = neox_files(arguments.configs)
    if not files:
        missing = [name for name in arguments.configs if not Path(name).is_file()]
        what = "no such file" if missing else "it has no key of GPT-NeoX"
        raise UserError(f"{Path((missing or arguments.configs)[0]).absolute()}: {what}; expected a GPT-NeoX config")
    run, account = load_neox(files, [], arguments.ranks)
    text = dump(run)
    if arguments.output is None:
        print(text, end="")
    else:
        if arguments.output.exists():
            raise UserError(f"{arguments.output}: exists; choose another name or remove it")
        arguments.output.write_text(text, encoding="utf-8")
    show_account(account, make_console(stderr=True))
