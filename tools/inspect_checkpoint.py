#!/usr/bin/env python3
"""Look into a checkpoint: python tools/inspect_checkpoint.py CHECKPOINT [--norms] [--diff OTHER] [--verify]"""

from __future__ import annotations

import find_megarewarm  # noqa: F401  # isort: skip
import argparse
import sys

from rich.console import Console

from megarewarm.checkpoint import inspection
from megarewarm.checkpoint.progress import reading
from megarewarm.checkpoint.source import OwnCheckpoint, open_checkpoint
from megarewarm.config.paths import text_argument
from megarewarm.errors import EXIT_BAD_INPUT, UserError


def main() -> None:
    parser = argparse.ArgumentParser(description="Show what is in a checkpoint of any form that megarewarm reads.")
    parser.add_argument("checkpoint", type=text_argument, help="folder or hub name, as for start.from")
    parser.add_argument("--norms", action="store_true", help="root mean square and largest magnitude of every parameter")
    parser.add_argument("--diff", type=text_argument, metavar="OTHER", help="what changed from CHECKPOINT to OTHER")
    parser.add_argument("--most", type=int, default=20, help="parameters that --diff shows; default: %(default)s")
    parser.add_argument("--verify", action="store_true", help="read every file and compare its checksum")
    arguments = parser.parse_args()
    console = Console(soft_wrap=not sys.stdout.isatty())
    try:
        source = open_checkpoint(arguments.checkpoint)
        if arguments.verify:
            if not isinstance(source, OwnCheckpoint):
                raise UserError(f"{source.name}: {source.format} checkpoints have no checksums; only megarewarm's have")
            source.verify(alone=True)
            console.print(f"{source.name}: every file is as it was written", style="green", highlight=False)
        console.print(inspection.state_table(source))
        console.print()
        console.print(inspection.lineage_tree(source))
        size = inspection.size_of(source.stored)
        if arguments.norms:
            with reading(console, "norms", size) as advance:
                found = list(inspection.norms(source, advance))
            console.print()
            console.print(inspection.norms_table(found))
        if arguments.diff is not None:
            other = open_checkpoint(arguments.diff)
            with reading(console, "differences", size + inspection.size_of(other.stored)) as advance:
                changes = list(inspection.differences(source, other, advance))
            console.print(f"\nfrom {source.name} to {other.name}", style="bold", highlight=False)
            console.print(inspection.differences_table(changes, arguments.most))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    main()
