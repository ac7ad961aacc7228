"""Train a tokenizer: megarewarm tokenizer FILE [FILE ...] --vocab-size 32768 --output tokenizer.json"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megarewarm.arguments import Parser, path_text
from megarewarm.process import importing
from megarewarm.spelling import counted


def command_line() -> Parser:
    parser = Parser(description="Train a byte-level BPE tokenizer or a sentencepiece model.")
    parser.add_argument(
        "files",
        type=path_text,
        nargs="+",
        metavar="FILE",
        help=".jsonl, .txt (also .gz, .zst), .parquet, folders, patterns, -",
    )
    parser.add_argument("--vocab-size", required=True, type=int, help="number of ids, special tokens included")
    parser.add_argument("--output", required=True, type=Path, help=".json: byte-level BPE, .model: sentencepiece")
    parser.add_argument(
        "--text-key", default="text", help="key or column of the text, dots divide nested keys; default: %(default)s"
    )
    parser.add_argument(
        "--sample-mb", type=_megabytes, default=100.0, help="megabytes of text to train on; default: %(default)g"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    return parser


def main(words: Sequence[str]) -> None:
    parser = command_line()
    arguments = parser.parse_args(words)
    with importing():
        from megarewarm.console import make_bar, make_console
        from megarewarm.data.text.preprocess.documents import Documents, first_bytes
        from megarewarm.data.text.tokenizers import train_bpe, train_sentencepiece

    trainers = {".json": train_bpe, ".model": train_sentencepiece}
    if arguments.output.suffix not in trainers:
        parser.error(f"--output {arguments.output}: expected a name that ends in {' or '.join(trainers)}")
    if arguments.output.exists() and not arguments.overwrite:
        parser.error(f"--output {arguments.output} exists: choose another name or add --overwrite")
    documents = Documents(arguments.files, arguments.text_key)
    console = make_console(stderr=True)
    with make_bar(console) as bar:
        limit = int(arguments.sample_mb * 1e6)
        task = bar.add_task("reading and training", total=min(limit, documents.total_bytes) or None)
        texts = first_bytes(documents, limit, lambda done: bar.update(task, completed=done))
        tokenizer = trainers[arguments.output.suffix](texts, arguments.vocab_size, arguments.output)
        bar.update(task, total=1, completed=1)
    print(f"{arguments.output}: {tokenizer.vocab_size:,} ids, id {tokenizer.eod_id} ends a document")
    if documents.skipped.broken:
        print(f"left out: {counted(documents.skipped.broken, 'broken record')}", *documents.skipped.examples, sep="\n  ")


def _megabytes(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of megabytes above 0")
    return value
