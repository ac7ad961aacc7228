#!/usr/bin/env python3
"""Write GPT-NeoX files as a run of megarewarm: python tools/convert_config.py 410M.yml local_setup.yml --output run.yml"""

from __future__ import annotations

import find_megarewarm  # noqa: F401  # isort: skip
import argparse
import sys
from pathlib import Path

from rich.console import Console

from megarewarm.config.load import dump
from megarewarm.config.neox_read import neox_files
from megarewarm.config.paths import path_argument
from megarewarm.errors import EXIT_BAD_INPUT, UserError
from megarewarm.rewarm.neox_start import load_neox, show_account


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="GPT-NeoX files, merged as GPT-NeoX does")
    parser.add_argument("--output", type=path_argument, metavar="FILE", help="default: standard output")
    parser.add_argument("--ranks", type=int, help="ranks of the run, for the global batch; default: as few as the files need")
    arguments = parser.parse_args()
    try:
        files = neox_files(arguments.configs)
        if not files:
            missing = [name for name in arguments.configs if not Path(name).is_file()]
            what = "no such file" if missing else "no key of GPT-NeoX in it"
            raise UserError(f"{(missing or arguments.configs)[0]}: {what}; expected a configuration of GPT-NeoX")
        run, account = load_neox(files, [], arguments.ranks)
        text = dump(run)
        if arguments.output is None:
            print(text, end="")
        else:
            if arguments.output.exists():
                raise UserError(f"{arguments.output}: exists; choose another name or remove it")
            arguments.output.write_text(text, encoding="utf-8")
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    show_account(account, Console(stderr=True))


if __name__ == "__main__":
    main()
