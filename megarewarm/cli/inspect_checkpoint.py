"""Inspect a checkpoint: megarewarm inspect CHECKPOINT [--norms] [--rows] [--diff OTHER] [--verify]"""

from __future__ import annotations

from collections.abc import Sequence

from megarewarm.arguments import Parser, path_text
from megarewarm.errors import UserError
from megarewarm.process import importing


def command_line() -> Parser:
    parser = Parser(description="Show the contents of a checkpoint in any format that megarewarm reads.")
    parser.add_argument("checkpoint", type=path_text, help="folder or hub name, as for start.from")
    parser.add_argument("--norms", action="store_true", help="root mean square and largest magnitude of every parameter")
    parser.add_argument("--rows", action="store_true", help="rows of the embedding and the head that were never trained")
    parser.add_argument("--diff", type=path_text, metavar="OTHER", help="show what changed from CHECKPOINT to OTHER")
    parser.add_argument("--most", type=int, default=20, help="parameters that --diff shows; default: %(default)s")
    parser.add_argument("--verify", action="store_true", help="read every file and compare its checksum")
    return parser


def main(words: Sequence[str]) -> None:
    parser = command_line()
    arguments = parser.parse_args(words)
    with importing():
        from megarewarm.checkpoint import inspection, untrained_rows
        from megarewarm.checkpoint.progress import reading
        from megarewarm.checkpoint.source import OwnCheckpoint, open_checkpoint
        from megarewarm.console import make_console

    console = make_console()
    source = open_checkpoint(arguments.checkpoint)
    if arguments.verify:
        if not isinstance(source, OwnCheckpoint):
            raise UserError(f"{source.name}: {source.format} checkpoints have no checksums; only megarewarm's do")
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
    if arguments.rows:
        with reading(console, "rows", size) as advance:
            sets = untrained_rows.untrained_rows(source, advance)
        console.print()
        console.print(untrained_rows.table(source, sets))
    if arguments.diff is not None:
        other = open_checkpoint(arguments.diff)
        with reading(console, "differences", size + inspection.size_of(other.stored)) as advance:
            changes = list(inspection.differences(source, other, advance))
        console.print(f"\nfrom {source.name} to {other.name}", style="bold", highlight=False)
        console.print(inspection.differences_table(changes, arguments.most))
