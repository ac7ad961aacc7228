"""Score the documents of a token file: megarewarm score-data PREFIX --with CHECKPOINT [--minus CHECKPOINT]"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megarewarm.arguments import Parser, count, path_text
from megarewarm.process import EXIT_INTERRUPTED, importing, say

if TYPE_CHECKING:
    from rich.console import Console

    from megarewarm.console import WorkShown
    from megarewarm.selection.desk import ShowProgress
    from megarewarm.selection.score_file import ScoredFile
    from megarewarm.selection.scoring_model import ScoringModel

_EXAMPLES, _TOKENS, _CHARACTERS = 3, 400, 160
_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


def command_line() -> Parser:
    parser = Parser(
        description="Write the loss of every document (mean nats per token, each read by itself) beside its token file, "
        "for select-data and data.order; with --minus the difference of two checkpoints."
    )
    parser.add_argument("prefix", type=path_text, metavar="PREFIX", help="token file, without suffix")
    parser.add_argument(
        "--with",
        required=True,
        type=path_text,
        dest="model",
        metavar="CHECKPOINT",
        help="folder or hub name, as for start.from",
    )
    parser.add_argument(
        "--minus", type=path_text, metavar="CHECKPOINT", help="subtract this one's loss: what is left is what it knows better"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: PREFIX.loss, or PREFIX.loss_difference")
    parser.add_argument("--sequence-length", type=count, metavar="S", help="of a window; default: all positions of the model")
    parser.add_argument("--micro-batch", type=count, default=4, metavar="B", help="windows at a time; default: %(default)s")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace the scores if they exist")
    return parser


def main(words: Sequence[str]) -> int:
    arguments = command_line().parse_args(words)
    with importing():
        from megarewarm.console import WorkShown, make_console
        from megarewarm.data.files.document_table import table_path
        from megarewarm.selection.score_file import score_file, score_path, work_folder
        from megarewarm.selection.scoring_model import ScoringModel

    output = arguments.output or score_path(arguments.prefix, difference=arguments.minus is not None)
    model, minus = (
        name
        and ScoringModel(
            name,
            device=arguments.device,
            sequence_length=arguments.sequence_length,
            micro_batch=arguments.micro_batch,
            precision=arguments.precision,
        )
        for name in (arguments.model, arguments.minus)
    )
    bar = WorkShown(make_console(stderr=True))
    try:
        scored = score_file(arguments.prefix, model, minus, output, show=_tokens(bar), overwrite=arguments.overwrite)
    except KeyboardInterrupt:
        bar.finish()
        say(f"stopped; the same command continues from {work_folder(table_path(output))}")
        return EXIT_INTERRUPTED
    finally:
        bar.finish()
    _summarise(scored, model, make_console(highlight=False))
    return 0


def _tokens(bar: WorkShown) -> ShowProgress:
    """A ``selection.desk.Show`` of tokens, tokens/s and the time left."""
    from megarewarm.spelling import duration_text, tokens_text

    def show(doing: str, done: int, total: int) -> None:
        def speed(seconds: float, since: int) -> str:
            left = duration_text(seconds * (total - done) / since) if since else "?"
            return f"{tokens_text(since / seconds)} tokens/s, left {left}"

        bar.show(doing, done, total, speed)

    return show


def _summarise(scored: ScoredFile, model: ScoringModel, console: Console) -> None:
    """Print the percentiles and examples of both ends, and draw the distribution where matplotlib is there."""
    import numpy as np

    from megarewarm.spelling import counted

    scores, sizes, file = scored.scores, scored.file.sizes, scored.file
    there = np.flatnonzero(np.isfinite(scores))
    name = scored.table.about["name"]
    console.print(f"{scored.place}: {name} of {counted(len(scores), 'document')}, {int(sizes.sum()):,} tokens", soft_wrap=True)
    if missing := len(scores) - len(there):
        console.print(f"{counted(missing, 'document')} of fewer than 2 tokens without a score")
    if not len(there):
        return
    weights = np.maximum(sizes[there] - 1, 1)
    mean = float(np.average(scores[there], weights=weights))
    console.print(f"mean over documents {scores[there].mean():.4f}, over tokens {mean:.4f} nats")
    found = np.percentile(scores[there], _PERCENTILES)
    console.print("percentile " + "".join(f"{percent:>8}" for percent in _PERCENTILES))
    console.print("nats       " + "".join(f"{value:>8.3f}" for value in found))
    if (tokenizer := model.tokenizer_of(file)) is not None:
        order = there[np.argsort(scores[there], kind="stable")]
        for title, chosen in (("lowest", order[:_EXAMPLES]), ("highest", order[::-1][:_EXAMPLES])):
            console.print(f"{title}:")
            for document in chosen.tolist():
                ids = file.document(document)[:_TOKENS]
                text = " ".join(tokenizer.decode(ids[ids < tokenizer.vocab_size]).split())
                shown = text if len(text) <= _CHARACTERS else f"{text[: _CHARACTERS - 3]}..."
                line = f"  {scores[document]:.3f}  document {document}, {int(sizes[document]):,} tokens: {shown}"
                console.print(line, markup=False)
    _draw(scored, f"{name}, nats per token", console)


def _draw(scored: ScoredFile, what: str, console: Console) -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        console.print("no picture: pip install 'megarewarm\\[report]'")
        return
    from megarewarm.report.figures.scores import draw_scores
    from megarewarm.report.figures.style import style

    picture = scored.place.with_suffix(".png")
    figure = draw_scores(scored.scores, scored.file.sizes, what)
    with style():
        figure.savefig(picture, dpi=160)
    console.print(f"{picture}: their distribution", soft_wrap=True)
