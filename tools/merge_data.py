#!/usr/bin/env python3
"""Token files as one: python tools/merge_data.py PREFIX [PREFIX ...] --output PREFIX"""

from __future__ import annotations

import find_megarewarm  # noqa: F401  # isort: skip
import argparse
import sys

from rich.console import Console
from rich.progress import Progress

from megarewarm.config.paths import path_argument, text_argument
from megarewarm.data.merge import merge_token_files
from megarewarm.data.token_file import open_tokens
from megarewarm.errors import EXIT_BAD_INPUT, UserError


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the documents of several .bin/.idx pairs into one, in the order given.")
    parser.add_argument("prefixes", type=text_argument, nargs="+", metavar="PREFIX", help="name of a pair without suffix")
    parser.add_argument("--output", required=True, type=path_argument, metavar="PREFIX", help="the new pair's name")
    parser.add_argument("--overwrite", action="store_true", help="replace the files if they exist")
    arguments = parser.parse_args()
    try:
        total = sum(open_tokens(prefix).total_tokens for prefix in arguments.prefixes)
        with Progress(transient=True, disable=not sys.stderr.isatty(), console=Console(stderr=True)) as bar:
            task = bar.add_task("merging", total=total)
            documents, tokens = merge_token_files(
                arguments.prefixes,
                arguments.output,
                overwrite=arguments.overwrite,
                progress=lambda count: bar.advance(task, count),
            )
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except OSError as error:
        print(f"{error.filename or arguments.output}: {error.strerror or error}; nothing was written", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        sys.exit(130)
    print(f"{arguments.output}: {documents:,} documents, {tokens:,} tokens")


if __name__ == "__main__":
    main()
