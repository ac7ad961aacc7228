#!/usr/bin/env python3
"""Text to token files: python tools/preprocess_data.py FILE [FILE ...] --tokenizer tokenizer.json --output PREFIX"""

from __future__ import annotations

import find_megarewarm  # noqa: F401  # isort: skip
import argparse
import sys
from pathlib import Path

from rich.progress import Progress

from megarewarm.data.preprocess import Counts, Documents, prepare
from megarewarm.data.tokenizers import load_tokenizer
from megarewarm.errors import EXIT_BAD_INPUT, UserError


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokenise text into PREFIX.bin, PREFIX.idx and PREFIX.json.")
    parser.add_argument("files", nargs="+", metavar="FILE", help=".jsonl or .txt, also with .gz or .zst added")
    parser.add_argument("--tokenizer", required=True, help="tokenizer.json, sentencepiece .model, or a folder with one")
    parser.add_argument("--output", required=True, type=Path, metavar="PREFIX", help="the files' name, without suffix")
    parser.add_argument("--text-key", default="text", help="key of the text in .jsonl; default: %(default)s")
    parser.add_argument("--eod-token", help="token that ends a document; default: the tokenizer's, as <|endoftext|>")
    parser.add_argument("--no-eod", action="store_true", help="put nothing between the documents")
    parser.add_argument("--overwrite", action="store_true", help="replace the files if they exist")
    arguments = parser.parse_args()
    try:
        tokenizer = load_tokenizer(arguments.tokenizer, eod_token=arguments.eod_token)
        documents = Documents(arguments.files, arguments.text_key)
        with Progress() as bar:
            task = bar.add_task("tokenising", total=documents.total_bytes)

            def show(counts: Counts) -> None:
                bar.update(task, completed=documents.bytes_read, description=f"{counts.tokens:,} tokens")

            counts = prepare(
                documents,
                tokenizer,
                arguments.output,
                append_eod=not arguments.no_eod,
                overwrite=arguments.overwrite,
                progress=show,
            )
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    print(f"{arguments.output}: {counts.documents:,} documents, {counts.tokens:,} tokens, {counts.bytes:,} bytes")
    for note in tokenizer.notes:
        print(note)
    if documents.empty:
        print(f"left out: {documents.empty:,} empty documents")
    if documents.broken:
        print(f"left out: {documents.broken:,} broken records", *documents.examples, sep="\n  ")


if __name__ == "__main__":
    main()
