"""Merge token files into one: megarewarm merge-data PREFIX [PREFIX ...] --output PREFIX"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megarewarm.arguments import Parser, path_text
from megarewarm.errors import UserError
from megarewarm.process import importing
from megarewarm.spelling import counted


def command_line() -> Parser:
    parser = Parser(description="Write the documents of several .bin/.idx pairs into one, in the order given.")
    parser.add_argument("prefixes", type=path_text, nargs="+", metavar="PREFIX", help="name of a pair without suffix")
    parser.add_argument("--output", required=True, type=Path, metavar="PREFIX", help="the new pair's name, without suffix")
    parser.add_argument("--overwrite", action="store_true", help="replace the files if they exist")
    return parser


def main(words: Sequence[str]) -> None:
    parser = command_line()
    arguments = parser.parse_args(words)
    with importing():
        from megarewarm.console import make_bar, make_console
        from megarewarm.data.files.merge import merge_token_files
        from megarewarm.data.files.token_file import open_tokens

    total = sum(open_tokens(prefix).total_tokens for prefix in arguments.prefixes)
    try:
        with make_bar(make_console(stderr=True)) as bar:
            task = bar.add_task("merging", total=total)
            documents, tokens = merge_token_files(
                arguments.prefixes,
                arguments.output,
                overwrite=arguments.overwrite,
                progress=lambda count: bar.advance(task, count),
            )
    except OSError as error:
        raise UserError(f"{error.filename or arguments.output}: {error.strerror or error}; nothing was written") from error
    print(f"{arguments.output}: {counted(documents, 'document')}, {counted(tokens, 'token')}")
