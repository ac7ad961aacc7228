"""Copy the example configs and Slurm scripts: megarewarm configs [FOLDER]"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from megarewarm.arguments import Parser
from megarewarm.errors import UserError
from megarewarm.resources import FOLDER


def command_line() -> Parser:
    parser = Parser(description="Copy the example configs (configs/) and the Slurm scripts (slurm/) into a folder.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(), help="default: the current one")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    return parser


def main(words: Sequence[str]) -> None:
    arguments = command_line().parse_args(words)
    files = [path for part in ("configs", "slurm") for path in sorted((FOLDER / part).rglob("*")) if path.is_file()]
    copies = {path: arguments.folder / path.relative_to(FOLDER) for path in files}
    if there := [copy for copy in copies.values() if copy.exists() and not arguments.overwrite]:
        raise UserError(f"{there[0]}: exists; add --overwrite, or give another folder")
    for path, copy in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
        print(copy)
