"""Add tokens to a tokenizer: megarewarm extend-tokenizer BASE new/*.txt --add 8000 --output tok/

    megarewarm extend-tokenizer EleutherAI/pythia-160m german/*.jsonl --add 8000 --output tok/ --old english/held_out.txt
    megarewarm extend-tokenizer base/tokenizer.json --tokens special.txt --output tok/

It continues the merges of a byte-level BPE (GPT-NeoX, GPT-2, Llama 3, Qwen, OLMo, SmolLM) on the new text, so that every new
token is reached. Old ids stay. It prints how many bytes a token holds before and after. 'megarewarm extend-vocabulary' then
gives a checkpoint the rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megarewarm.arguments import Parser, count, path_text
from megarewarm.errors import UserError
from megarewarm.process import importing
from megarewarm.spelling import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from megarewarm.data.text.extended_tokenizer import Base, Extended
    from megarewarm.data.text.word_counts import WordCounts

_SHOWN = 12  # new tokens that are printed


def command_line() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=path_text, metavar="BASE", help="tokenizer.json, a folder with one, or a hub name")
    parser.add_argument(
        "files",
        type=path_text,
        nargs="*",
        metavar="FILE",
        help="new text: .jsonl, .txt (.gz, .zst), .parquet, folders, patterns",
    )
    parser.add_argument("--add", type=count, metavar="N", help="tokens to add by merges")
    parser.add_argument("--tokens", type=Path, metavar="FILE", help="special tokens to add, one a line")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--old", type=path_text, nargs="+", default=[], metavar="FILE", help="held-out old text, to measure on")
    parser.add_argument(
        "--min-count", type=count, default=2, metavar="N", help="of a pair that is merged; default: %(default)s"
    )
    parser.add_argument("--text-key", default="text", help="key or column of the text; default: %(default)s")
    return parser


def main(words: Sequence[str]) -> None:
    arguments = command_line().parse_args(words)
    _refuse(arguments)
    with importing():
        from megarewarm.checkpoint.export.tokenizer_files import refuse_existing, write_folder
        from megarewarm.console import make_bar, make_console
        from megarewarm.data.text.extended_tokenizer import Base, files_of
        from megarewarm.data.text.word_counts import WordCounts

    refuse_existing(arguments.output)
    console = make_console()
    base = Base(arguments.base, _special(arguments.tokens))
    counted: dict[str, WordCounts] = {}
    with make_bar(make_console(stderr=True)) as bar:
        for name, files in (("new text", arguments.files), ("old text", arguments.old)):
            if files:
                counted[name] = _words(base, files, arguments.text_key, f"reading {name}", bar, console)
        task = bar.add_task("merging", total=arguments.add or 0)
        extended = base.extended(
            counted.get("new text", WordCounts({})), arguments.add or 0, arguments.min_count, lambda: bar.advance(task)
        )
    write_folder(files_of(base.tokenizer, extended, arguments.output), arguments.output)
    if counted:
        console.print(_table(base, extended, counted))
    for line in _lines(base, extended, counted, arguments.min_count):
        console.print(f"{arguments.output}: {line}", highlight=False, markup=False)


def _refuse(arguments: argparse.Namespace) -> None:
    if not arguments.add and arguments.tokens is None:
        raise UserError("nothing to add: give --add with new text, or --tokens with a file of special tokens")
    if arguments.add and not arguments.files:
        raise UserError(f"--add {arguments.add}: no new text to merge on; name its files after BASE")
    if arguments.files and not arguments.add:
        raise UserError(f"{arguments.files[0]}: new text is read for --add only; give --add, or leave the files out")


def _special(path: Path | None) -> list[str]:
    """The lines of ``--tokens``."""
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # of some editors, which begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--tokens {path}: can't be read ({error}); give a text file with a token on each line") from error
    if not lines:
        raise UserError(f"--tokens {path}: is empty; give a text file with a token on each line")
    return lines


def _words(base: Base, files: Sequence[str], key: str, what: str, bar: Progress, console: Console) -> WordCounts:
    from megarewarm.data.text.preprocess.documents import Documents

    documents = Documents(files, key)
    task = bar.add_task(what, total=documents.total_bytes or None)
    words = base.words(documents, lambda: bar.update(task, completed=documents.bytes_read))
    if documents.skipped.broken:
        console.print(
            f"left out: {counted(documents.skipped.broken, 'broken record')}", *documents.skipped.examples, sep="\n  "
        )
    if not words.counts:
        raise UserError(f"{files[0]}: there is no text in it; give files with text")
    return words


def _table(base: Base, extended: Extended, counted: dict[str, WordCounts]) -> Table:
    from rich.table import Table

    from megarewarm.data.text.extended_tokenizer import lengths

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("", "bytes", "tokens before", "after", "bytes per token before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, words in counted.items():
        before, after = lengths(words, base.content), lengths(words, extended.content)
        per_token = (f"{each.bytes_per_token:.3f}" for each in (before, after))
        table.add_row(name, f"{before.bytes:,}", f"{before.tokens:,}", f"{after.tokens:,}", *per_token)
    return table


def _lines(base: Base, extended: Extended, counted: dict[str, WordCounts], least_count: int) -> Iterator[str]:
    from megarewarm.data.text.extended_tokenizer import shown

    new = len(extended.merged) + len(extended.special)
    yield (
        f"{extended.size:,} ids, {new:,} of them new ({extended.first}-{extended.size - 1}); {base.tokenizer.path} had "
        f"{extended.first:,}, which stay"
    )
    if extended.merged:
        first = ", ".join(repr(shown(token)) for token in extended.merged[:_SHOWN])
        yield f"the first new tokens: {first}"
        yield (
            f"the rarest pair that was merged occurred {extended.least:,} times (--min-count {least_count}); "
            f"{extended.parts:,} of the new tokens are only parts of longer ones in the new text"
        )
    if extended.pruned:
        yield f"left out: {len(extended.pruned):,} tokens that the new text never has"
    if extended.special:
        yield "special tokens: " + ", ".join(
            f"{token!r} {number}" for number, token in enumerate(extended.special, extended.size - len(extended.special))
        )
    for name, words in counted.items():
        if words.left_out:
            yield f"{name}: {words.left_out:,} occurrences of rare words were not counted, because there are too many of them"
