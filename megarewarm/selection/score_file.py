"""The loss of every document of a token file, or the difference of two checkpoints' losses, as a table beside the file."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megarewarm import __version__
from megarewarm.data.files.document_table import DocumentTable, table_path, write_table
from megarewarm.data.files.token_file import TokenFile, open_tokens
from megarewarm.errors import UserError
from megarewarm.selection.desk import Desk, ShowProgress
from megarewarm.selection.scoring_model import ScoringModel, block_by_block
from megarewarm.selection.step import Corpus, Numbers
from megarewarm.selection.work import working

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ScoredFile:
    """``table``: the scores of the documents of ``file``; ``place``: where they were written."""

    file: TokenFile
    table: DocumentTable
    place: Path

    @property
    def scores(self) -> Scores:
        return self.table.values.astype(np.float64, copy=False)


def score_path(prefix: str, *, difference: bool) -> Path:
    """Where the scores of the token file ``prefix`` are by default."""
    bare = prefix.removesuffix(".bin").removesuffix(".idx")
    return table_path(f"{bare}.loss_difference" if difference else f"{bare}.loss")


def score_file(
    prefix: str, model: ScoringModel, minus: ScoringModel | None, output: Path, *, show: ShowProgress, overwrite: bool = False
) -> ScoredFile:
    """Write to ``output`` what ``model`` makes of each document of ``prefix``, less what ``minus`` does.

    A document's score is its mean loss in nats per target; NaN where it has no target. A start after a stop continues from
    ``output``.work, which is removed when the table is whole. Raises ``UserError``: for files and models that don't go
    together and for an existing ``output`` before any work. ``show`` is called with tokens.
    """
    place, file = table_path(output), open_tokens(prefix, vocab_size=model.config.vocab_size)
    if place.exists() and not overwrite:
        raise UserError(f"{place} exists: remove it, choose another name with --output, or add --overwrite")
    models = [model] if minus is None else [model, minus]
    for each in models:
        each.check_reads(file)
    width = file.dtype.itemsize
    in_tokens: ShowProgress = lambda doing, done, total: show(doing, done // width, total // width)  # noqa: E731
    with working(work := work_folder(place), Corpus((file,), (None,)), in_tokens) as desk:
        everything = np.arange(file.num_documents)
        scores = file_losses(file, everything, model, desk, {})
        about = {"name": "loss", "made_by": f"megarewarm {__version__}", **_named("", model)}
        if minus is not None:
            scores = scores - file_losses(file, everything, minus, desk, {})
            about |= {"name": "loss difference", **_named("minus_", minus)}
        table = DocumentTable("scores", scores, about)
        write_table(place, table, file, overwrite=overwrite)
        shutil.rmtree(work, ignore_errors=True)
    return ScoredFile(file, table, place)


def work_folder(place: Path) -> Path:
    """Where the work for the table ``place`` is kept until it is whole."""
    return place.with_name(f"{place.name}.work")


def file_losses(file: TokenFile, documents: Numbers, model: ScoringModel, desk: Desk, depends: Mapping[str, Any]) -> Scores:
    """(n,) float64, mean nats per target of each of ``documents``, by their numbers in ``file``; see ``ScoringModel.losses``.
    Kept on the ``desk``, under what they depend on besides the model."""
    sizes, starts = file.sizes[documents], file.starts_of(documents)
    doing = f"loss by {model.name.rstrip('/').rpartition('/')[2]}"
    make = block_by_block(
        sizes,
        file.dtype.itemsize,
        lambda done, total: desk.show(doing, done, total),
        lambda some, progress: model.losses(file, starts[some], sizes[some], progress),
    )
    return np.array(desk.rows("losses", {**model.identity, **depends}, (len(documents),), np.float64, make))


def _named(prefix: str, model: ScoringModel) -> dict[str, str]:
    return {prefix + key: value for key, value in model.identity.items()}
