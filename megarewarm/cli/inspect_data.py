"""Inspect a token file: megarewarm inspect-data PREFIX [--document N] [--pack S] [--verify] [--compare OTHER]"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megarewarm.arguments import STORED_DTYPES, Parser, path_text
from megarewarm.errors import UserError
from megarewarm.process import importing
from megarewarm.spelling import counted

if TYPE_CHECKING:
    from rich.table import Table

    from megarewarm.data.files.inspection import Lengths


def command_line() -> Parser:
    parser = Parser(description="Show the contents of a .bin/.idx pair or a bare .bin.")
    parser.add_argument("prefix", type=path_text, metavar="PREFIX", help="the pair's name without suffix, or a bare .bin")
    parser.add_argument("--dtype", choices=STORED_DTYPES, help="of a bare .bin")
    parser.add_argument("--tokenizer", type=path_text, help="to show text and check ids: a tokenizer.json or .model")
    parser.add_argument("--document", type=int, metavar="N", help="show document N, counted from 0")
    parser.add_argument("--verify", action="store_true", help="read everything and check every invariant of the format")
    parser.add_argument("--pack", type=int, metavar="S", help="show what data.pack: best_fit makes of it at sequence_length S")
    parser.add_argument("--compare", type=path_text, metavar="OTHER", help="show the first difference from another token file")
    return parser


def main(words: Sequence[str]) -> None:
    parser = command_line()
    arguments = parser.parse_args(words)
    with importing():
        from rich.filesize import decimal

        from megarewarm.console import make_console, only_ascii
        from megarewarm.data.files.inspection import first_difference, lengths, verify
        from megarewarm.data.files.token_file import open_tokens
        from megarewarm.data.order.packed_samples import PackedSamples
        from megarewarm.data.text.tokenizers import load_tokenizer

    console = make_console()
    file = open_tokens(arguments.prefix, dtype=arguments.dtype)
    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    console.print(
        f"{file.path}: {file.dtype.name}, {counted(file.num_documents, 'document')}, {counted(file.total_tokens, 'token')}, "
        f"{decimal(file.total_tokens * file.dtype.itemsize)}, fingerprint {file.fingerprint()}",
        highlight=False,
    )
    if arguments.document is not None:
        if not 0 <= arguments.document < file.num_documents:
            raise UserError(f"--document {arguments.document}: the file has {file.num_documents:,} documents, counted from 0")
        ids = file.document(arguments.document)
        if tokenizer and (bad := ids[(ids.astype("int64") < 0) | (ids >= tokenizer.vocab_size)]).size:
            raise UserError(
                f"document {arguments.document} holds id {bad[0]}, {tokenizer.path} has {tokenizer.vocab_size} ids: the "
                f"file was made with another tokenizer, or is damaged"
            )
        text = tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids.tolist()))
        console.print(text, markup=False, highlight=False)
    else:
        console.print(show(lengths(file), "#" if only_ascii(console) else "█"))
    if arguments.pack is not None:
        if arguments.pack < 1:
            raise UserError(f"--pack {arguments.pack}: expected a sequence_length, 1 or more")
        console.print(f"best_fit: {PackedSamples(file.view(), arguments.pack, None).packing}", highlight=False)
    if arguments.verify:
        for line in verify(file, tokenizer.vocab_size if tokenizer else None):
            console.print(line, style="green", highlight=False)
    if arguments.compare:
        difference = first_difference(arguments.prefix, arguments.compare, arguments.dtype)
        console.print(difference or "the same documents with the same ids", highlight=False)


def show(found: Lengths, bar: str = "█") -> Table:
    from rich.table import Table

    table = Table(box=None, header_style="bold", caption_justify="left", padding=(0, 2, 0, 0))
    table.caption = f"median {found.median:,.0f} tokens, longest {found.longest:,}, {found.empty:,} empty documents"
    for heading in ("tokens", "documents"):
        table.add_column(heading, justify="right")
    table.add_column("")
    most = max((count for _, _, count in found.bins), default=1)
    for first, last, count in found.bins:
        table.add_row(f"{first:,} to {last:,}", f"{count:,}", bar * round(40 * count / most))
    return table
