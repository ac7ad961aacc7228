"""Text to token files: megarewarm prepare FILE [FILE ...] --tokenizer tokenizer.json --output PREFIX"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megarewarm.arguments import STORED_DTYPES, Parser, count, path_text, seed
from megarewarm.process import EXIT_INTERRUPTED, importing, say

if TYPE_CHECKING:
    from megarewarm.console import WorkShown
    from megarewarm.data.text.preprocess import job


def command_line() -> Parser:
    parser = Parser(
        description="Tokenise text into PREFIX.bin, PREFIX.idx and PREFIX.json, which describes them. The output does not "
        "depend on the number of workers. --resume continues an interrupted run."
    )
    parser.add_argument(
        "inputs",
        type=path_text,
        nargs="+",
        metavar="INPUT",
        help=".jsonl or .txt (also with .gz or .zst added), .parquet, folders of them, quoted patterns, - for .jsonl on stdin",
    )
    parser.add_argument(
        "--tokenizer", type=path_text, required=True, help="tokenizer.json, sentencepiece .model, GPT-2 vocab.json, or a folder"
    )
    parser.add_argument("--merges", type=path_text, help="GPT-2's merges.txt; default: the one beside vocab.json")
    parser.add_argument("--output", required=True, type=Path, metavar="PREFIX", help="the files' name, without suffix")
    parser.add_argument("--text-key", default="text", help="key or column of the text, dots divide nested keys; default: text")
    parser.add_argument("--eod-token", help="token that ends a document; default: the tokenizer's, such as <|endoftext|>")
    eod = parser.add_mutually_exclusive_group()
    eod.add_argument("--append-eod", action="store_true", help="end each document with that token; this is the default")
    eod.add_argument("--no-eod", action="store_true", help="put nothing between the documents")
    parser.add_argument("--ftfy", action="store_true", help="repair broken Unicode with the package ftfy, which is slow")
    parser.add_argument("--format", choices=("pair", "raw"), default="pair", help="raw: PREFIX.bin alone, without an index")
    parser.add_argument("--dtype", choices=STORED_DTYPES, help="default: uint16 up to 65536 ids, else int32")
    parser.add_argument(
        "--split", metavar="A,B,C", help="such as 0.98,0.01,0.01: PREFIX_train, _valid, _test, by each document's hash"
    )
    parser.add_argument("--shuffle", action="store_true", help="write the documents in random order")
    parser.add_argument("--seed", type=seed, default=1234, help="seed of --shuffle; default: %(default)s")
    parser.add_argument("--max-documents", type=count, metavar="N", help="use only the first N documents of the input")
    parser.add_argument("--strict", action="store_true", help="stop at the first broken or empty record")
    parser.add_argument("--workers", type=count, metavar="N", help="processes on this machine; default: one per core")
    parser.add_argument("--mpi", action="store_true", help="the ranks of this MPI job are the workers (one hands out the work)")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run with the same options")
    parser.add_argument("--overwrite", action="store_true", help="replace the files if they exist")
    return parser


def main(words: Sequence[str]) -> int:
    parser = command_line()
    arguments = parser.parse_args(words)
    with importing():
        from megarewarm.console import WorkShown, make_console
        from megarewarm.data.files.split import parse_split
        from megarewarm.data.text.preprocess import job

    if arguments.mpi and arguments.workers:
        parser.error("--workers: with --mpi the ranks are the workers")
    options = job.Options(
        text_key=arguments.text_key,
        eod_token=arguments.eod_token,
        merges=arguments.merges,
        append_eod=not arguments.no_eod,
        ftfy=arguments.ftfy,
        format=arguments.format,
        dtype=arguments.dtype,
        split=parse_split(arguments.split) if arguments.split else None,
        shuffle=arguments.seed if arguments.shuffle else None,
        max_documents=arguments.max_documents,
        strict=arguments.strict,
    )
    bar = WorkShown(make_console(stderr=True))
    try:
        written = job.preprocess(
            arguments.inputs,
            arguments.tokenizer,
            arguments.output,
            options,
            worker_count=arguments.workers,
            mpi=arguments.mpi,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            tell=teller(bar),
        )
    except KeyboardInterrupt:
        bar.finish()
        say(f"stopped; the same command with --resume continues from {arguments.output}.parts")
        return EXIT_INTERRUPTED
    finally:
        bar.finish()
    for output in written:
        counts = output.counts
        print(f"{output.prefix}: {counts.documents:,} documents, {counts.tokens:,} tokens, {counts.bytes:,} bytes of text")
    for output in written[:1]:
        print(*output.notes, sep="\n", end="\n" * bool(output.notes))
        for reason, number in output.skipped.items():
            print(f"left out: {number:,} record{'s' * (number != 1)}: {reason}")
        print(*(f"  {example}" for example in output.examples), sep="\n", end="\n" * bool(output.examples))
    return 0


def teller(bar: WorkShown) -> Callable[[job.Progress], None]:
    """What shows the state of ``job.preprocess``: bytes or documents, their speed, and the time left."""

    def tell(progress: job.Progress) -> None:
        def speed(seconds: float, since: int) -> str:
            words = [f"{since / seconds / 1e6:,.1f} MB/s"] if progress.total else [f"{progress.documents:,} documents"]
            if progress.tokens:
                words.append(f"{progress.tokens / seconds / 1e6:,.2f} M tokens/s")
            if progress.total and since:
                left = round(seconds * (progress.total - progress.done) / since)
                words.append(f"left {datetime.timedelta(seconds=left)}")
            return ", ".join(words)

        bar.show(progress.doing, progress.done, progress.total, speed)

    return tell
