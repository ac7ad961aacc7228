"""Make a task file of text: megarewarm make-task held_out.jsonl --items 500 --output tasks/prose.jsonl"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megarewarm.arguments import Parser, count, path_text, seed
from megarewarm.process import importing, say
from megarewarm.spelling import counted


def command_line() -> Parser:
    parser = Parser(
        description="Make a task file for evaluation.tasks and 'megarewarm evaluate --tasks': which of several continuations "
        "of a passage is the document's own. The others have as many bytes and come from other documents. Give text that the "
        "model was not trained on, such as what it must not forget. The same text and seed give the same file."
    )
    parser.add_argument(
        "files",
        type=path_text,
        nargs="+",
        metavar="FILE",
        help=".jsonl, .txt (also .gz, .zst), .parquet, folders, patterns, -",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="ends in .jsonl; its name is the task's")
    parser.add_argument("--items", type=count, default=500, metavar="N", help="each of its own document; default: %(default)s")
    parser.add_argument("--choices", type=count, default=4, metavar="N", help="of each item; default: %(default)s")
    parser.add_argument("--context-bytes", type=count, default=400, metavar="N", help="default: %(default)s")
    parser.add_argument("--continuation-bytes", type=count, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=seed, default=1234, help="default: %(default)s")
    parser.add_argument("--text-key", default="text", help="key or column of the text; default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    return parser


def main(words: Sequence[str]) -> None:
    parser = command_line()
    arguments = parser.parse_args(words)
    if arguments.output.suffix != ".jsonl":
        parser.error(f"--output {arguments.output}: expected a name that ends in .jsonl")
    if arguments.output.exists() and not arguments.overwrite:
        parser.error(f"--output {arguments.output} exists: choose another name or add --overwrite")
    with importing():
        from megarewarm.data.text.continuations import Continuations, make_task
        from megarewarm.data.text.preprocess.documents import Documents
        from megarewarm.files import write_whole

    asked = Continuations(
        arguments.items, arguments.choices, arguments.context_bytes, arguments.continuation_bytes, arguments.seed
    )
    documents = Documents(arguments.files, arguments.text_key)
    made = make_task(documents, asked, ", ".join(arguments.files))
    write_whole(arguments.output, made.lines)
    print(
        f"{arguments.output}: {counted(asked.items, 'item')} of {asked.choices} choices, "
        f"{100 / asked.choices:.1f} % by guessing; {made.usable:,} of {made.documents:,} different documents are long enough"
    )
    if documents.skipped.broken:
        say(f"left out: {counted(documents.skipped.broken, 'broken record')}, the first: {documents.skipped.examples[0]}")
