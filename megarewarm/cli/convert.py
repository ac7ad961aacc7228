"""Convert a checkpoint: megarewarm convert SRC DST --to hf|neox|megarewarm

SRC is a run or checkpoint folder of megarewarm, a Hugging Face folder or hub name (organisation/name@revision), a folder of
GPT-NeoX (global_stepN, or the one with 'latest') or of Megatron-LM (iter_N, 'torch' format). One tensor is in memory at a time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from megarewarm.arguments import DTYPES, FORMS, Parser, count, path_text
from megarewarm.process import importing


def command_line() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=path_text, metavar="SRC")
    parser.add_argument("destination", metavar="DST", type=Path, help="a new folder, or an earlier conversion to replace")
    parser.add_argument("--to", required=True, choices=FORMS, help="the format to write")
    parser.add_argument("--tp", type=count, default=1, metavar="N", help="neox: tensor-parallel ranks; default: %(default)s")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="default: as stored; fp32 uses the optimizer's master weights if there are any"
    )
    parser.add_argument("--vocab-size", type=int, metavar="ROWS", help="cut the embedding and the head, or pad them with zeros")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json, or a folder with one; default: what SRC comes with"
    )
    return parser


def main(words: Sequence[str]) -> None:
    parser = command_line()
    arguments = parser.parse_args(words)
    with importing():
        from rich.filesize import decimal

        from megarewarm.checkpoint import convert
        from megarewarm.checkpoint.progress import reading
        from megarewarm.checkpoint.source import open_checkpoint
        from megarewarm.console import make_console

    console = make_console()
    source = open_checkpoint(arguments.source)
    dtype = convert.DTYPES[arguments.dtype] if arguments.dtype else None
    options = convert.ConvertOptions(arguments.to, dtype, arguments.tp, arguments.vocab_size, arguments.tokenizer)
    for note in source.notes:
        console.print(f"{source.name}: {note}", highlight=False)
    began = time.perf_counter()
    total = convert.bytes_to_read(source, options)
    with reading(console, f"{source.format} to {arguments.to}", total) as advance:
        notes = convert.convert(source, arguments.destination, options, advance)
    for note in notes:
        console.print(f"{arguments.destination}: {note}", highlight=False)
    seconds = time.perf_counter() - began
    console.print(
        f"{arguments.destination}: {decimal(total)} in {seconds:.1f} s ({decimal(int(total / seconds))}/s)", highlight=False
    )
