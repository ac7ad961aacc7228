"""Choose documents before a run: megarewarm select-data PREFIX [PREFIX ...] --output OUT --exact --near 0.8 ..."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megarewarm.arguments import Parser, count, path_text, share
from megarewarm.process import EXIT_INTERRUPTED, importing, say

if TYPE_CHECKING:
    from megarewarm.selection.output import Destination
    from megarewarm.selection.pipeline import Selection
    from megarewarm.selection.step import Corpus, Step

_OVERLAP = 0.2


def command_line() -> Parser:
    parser = Parser(
        description="Choose documents of token files: drop duplicates, what is tested, what was read before, and what clusters "
        "or scores say. The steps are taken in the order in which they are listed here, each on what the one before kept. The "
        "inputs stay as they are. The same command continues after an interruption."
    )
    parser.add_argument("inputs", type=path_text, nargs="+", metavar="PREFIX", help="name of a .bin/.idx pair without suffix")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="OUT", help="the new pair's name; with several inputs a folder for them"
    )
    steps = parser.add_argument_group("steps")
    steps.add_argument("--exact", action="store_true", help="drop all but one of equal documents")
    steps.add_argument(
        "--near", type=similarity, metavar="J", help="of documents whose 5-grams have this Jaccard similarity or more, keep one"
    )
    steps.add_argument("--unlike", type=path_text, nargs="+", metavar="PREFIX", help="drop what is in these token files")
    steps.add_argument(
        "--unlike-lineage", type=path_text, metavar="RUN", help="drop what this run or checkpoint was trained on"
    )
    steps.add_argument(
        "--semantic", type=kept_share, metavar="SHARE", help="keep this share of each input, dropping like documents (SemDeDup)"
    )
    steps.add_argument(
        "--diverse", type=kept_share, metavar="SHARE", help="keep this share, dropping the most prototypical documents (D4)"
    )
    steps.add_argument(
        "--score", type=path_text, metavar="loss|FILE", help="drop by the loss of --by, or by a file of megarewarm score-data"
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--overlap",
        type=share,
        default=_OVERLAP,
        metavar="SHARE",
        help="for --unlike and --unlike-lineage: of 13-grams, of the document or of the other one; default: 20%%",
    )
    how.add_argument(
        "--lineage-path", action="append", default=[], metavar="NAME=PREFIX", help="where a file of the lineage is now"
    )
    how.add_argument("--embed", type=path_text, metavar="CHECKPOINT", help="for --semantic and --diverse: whose states to use")
    how.add_argument("--clusters", type=count, metavar="K", help="for --semantic and --diverse; default: by the documents")
    how.add_argument("--by", type=path_text, metavar="CHECKPOINT", help="for --score loss")
    how.add_argument("--minus", type=path_text, metavar="CHECKPOINT", help="for --score loss: the loss of --by less this one's")
    ends = how.add_mutually_exclusive_group()
    ends.add_argument("--drop-easiest", type=share, metavar="SHARE", help="for --score: the documents of the lowest scores")
    ends.add_argument("--drop-hardest", type=share, metavar="SHARE", help="for --score: those of the highest scores")
    ends.add_argument("--keep-middle", type=kept_share, metavar="SHARE", help="for --score: drop as many of both ends")
    how.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="for models; default: %(default)s")
    what = parser.add_argument_group("output")
    what.add_argument("--dry-run", action="store_true", help="write only OUT.selection.html, to look at what would go")
    what.add_argument(
        "--as-manifest", action="store_true", help="write OUT.safetensors, a list of documents for a source, no new token file"
    )
    what.add_argument("--tokenizer", type=path_text, help="for --dry-run; default: the one that the inputs were made with")
    what.add_argument("--overwrite", action="store_true", help="replace the files if they exist")
    return parser


def similarity(text: str) -> float:
    """A Jaccard similarity, for ``argparse``."""
    value = _number(text)
    if not 0.1 <= value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a similarity from 0.1 to 1, such as 0.8")
    return value


def kept_share(text: str) -> float:
    """'75%' or '0.75' -> 0.75, for ``argparse``."""
    value = 1.0 if _number(text) == 1 or text.strip() == "100%" else share(text)
    if not value:
        raise argparse.ArgumentTypeError(f"'{text}' keeps nothing: expected a share above 0 to 1, such as 75%")
    return value


def main(words: Sequence[str]) -> int:
    parser = command_line()
    arguments = parser.parse_args(words)
    _check(parser, arguments)
    with importing():
        from megarewarm.cli.prepare import teller
        from megarewarm.console import WorkShown, make_console
        from megarewarm.data.text.preprocess.job import Progress
        from megarewarm.selection.opening import open_corpus
        from megarewarm.selection.output import Destination, write
        from megarewarm.selection.pipeline import select
        from megarewarm.selection.work import working

    corpus = open_corpus(arguments.inputs)
    names = tuple(file.path.with_suffix("").name for file in corpus.files)
    destination = Destination(arguments.output, names, arguments.as_manifest, arguments.overwrite)
    if not arguments.dry_run:
        destination.check(corpus.files)
    for file, end in zip(corpus.files, corpus.ends, strict=True):
        if end is None:
            say(f"{file.path}: no manifest names a token that ends its documents; all tokens are content")
    bar = WorkShown(make_console(stderr=True))
    tell = teller(bar)

    def show(doing: str, done: int, total: int) -> None:
        tell(Progress(doing, done, total))

    try:
        steps = _steps(arguments, corpus)
        with working(destination.work, corpus, show) as desk:
            selection = select(corpus, steps, desk)
            if arguments.dry_run:
                from megarewarm.selection.page import write_page

                write_page(selection, destination.page, arguments.tokenizer)
            else:
                write(selection, destination, show)
    except KeyboardInterrupt:
        bar.finish()
        say(f"stopped; the same command continues from {destination.work}")
        return EXIT_INTERRUPTED
    finally:
        bar.finish()
    for taken in selection.taken:
        print(taken.line, *(f"  {note}" for note in taken.chosen.notes), sep="\n")
    if arguments.dry_run:
        kept = f"; {destination.work} keeps the work for the selection itself" if destination.work.exists() else ""
        print(f"{destination.page}: what would go; no data were written{kept}")
    else:
        print(*_written(selection, destination), sep="\n")
    return 0


def _written(selection: Selection, destination: Destination) -> list[str]:
    lines = []
    for index, file in enumerate(selection.corpus.files):
        documents = selection.corpus.members(selection.kept, index)
        tokens = int(selection.corpus.sizes[documents].sum())
        lines.append(
            f"{destination.prefix(index)}: {len(documents):,} of {file.num_documents:,} documents, {tokens:,} of "
            f"{file.total_tokens:,} tokens"
        )
    return [*lines, f"{destination.manifest}: what went, and why"]


def _check(parser: Parser, given: argparse.Namespace) -> None:
    """End with one line where options don't fit together."""
    if not any((given.exact, given.near, given.unlike, given.unlike_lineage, given.semantic, given.diverse, given.score)):
        parser.error(
            "nothing is to be selected: give --exact, --near, --unlike, --unlike-lineage, --semantic, --diverse or --score"
        )
    end = given.drop_easiest is not None or given.drop_hardest is not None or given.keep_middle is not None
    embeds, lineage, scored = bool(given.semantic or given.diverse), bool(given.unlike_lineage), given.score is not None
    for option, value, needs, there in (
        ("--embed", given.embed, "--semantic or --diverse", embeds),
        ("--clusters", given.clusters, "--semantic or --diverse", embeds),
        ("--lineage-path", given.lineage_path, "--unlike-lineage", lineage),
        ("--by", given.by, "--score loss", given.score == "loss"),
        ("--minus", given.minus, "--score loss", given.score == "loss"),
        ("--drop-easiest, --drop-hardest and --keep-middle", end, "--score", scored),
        ("--tokenizer", given.tokenizer, "--dry-run", given.dry_run),
    ):
        if value and not there:
            parser.error(f"{option}: belongs to {needs}")
    if embeds and not given.embed:
        parser.error("--semantic and --diverse need --embed CHECKPOINT, whose states they compare")
    if given.score == "loss" and not given.by:
        parser.error("--score loss needs --by CHECKPOINT")
    if scored and not end:
        parser.error("--score needs one of --drop-easiest, --drop-hardest and --keep-middle")


def _steps(given: argparse.Namespace, corpus: Corpus) -> list[Step]:
    """The chosen steps in their order. Raises ``UserError``."""
    steps: list[Step] = []
    if given.exact:
        from megarewarm.selection.exact import Exact

        steps.append(Exact())
    if given.near:
        import rensa  # noqa: F401 - a missing one is named before any work

        from megarewarm.selection.near import Near

        steps.append(Near(given.near))
    if given.unlike:
        from megarewarm.selection.unlike import Unlike

        steps.append(Unlike(given.unlike, given.overlap, corpus))
    if given.unlike_lineage:
        from megarewarm.selection.unlike_lineage import UnlikeLineage

        steps.append(UnlikeLineage(given.unlike_lineage, given.overlap, corpus, _paths(given.lineage_path)))
    if given.semantic or given.diverse:
        import sklearn  # noqa: F401

        from megarewarm.selection.embeddings import Embedder
        from megarewarm.selection.prototypes import Prototypes
        from megarewarm.selection.scoring_model import ScoringModel
        from megarewarm.selection.semantic import Semantic

        embedder = Embedder(ScoringModel(given.embed, device=given.device))
        if given.semantic:
            steps.append(Semantic(given.semantic, embedder, given.clusters))
        if given.diverse:
            steps.append(Prototypes(given.diverse, embedder, given.clusters))
    if given.score:
        steps.append(_by_score(given, corpus))
    return steps


def _by_score(given: argparse.Namespace, corpus: Corpus) -> Step:
    from megarewarm.selection.percentile import ByPercentile, LossOf, ScoresInFile
    from megarewarm.selection.scoring_model import ScoringModel

    source: LossOf | ScoresInFile
    if given.score == "loss":
        models = [name and ScoringModel(name, device=given.device) for name in (given.by, given.minus)]
        source = LossOf(*models)
    else:
        source = ScoresInFile(given.score, corpus)
    if given.keep_middle is not None:
        return ByPercentile(source, "keep-middle", given.keep_middle)
    if given.drop_hardest is not None:
        return ByPercentile(source, "drop-hardest", given.drop_hardest)
    return ByPercentile(source, "drop-easiest", given.drop_easiest)


def _paths(given: Sequence[str]) -> dict[str, str]:
    """'pile=data/pile' as the new place of a file."""
    from megarewarm.errors import UserError

    for text in given:
        if not all(text.partition("=")):
            raise UserError(f"--lineage-path {text}: expected NAME=PREFIX, a name in the lineage and its place now")
    return {name: path_text(path) for name, _, path in (text.partition("=") for text in given)}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return -1.0
