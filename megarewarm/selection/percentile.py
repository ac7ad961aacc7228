"""Drops the documents of the lowest or highest scores, or both, by a percentile of each file's scores.

Data Diet (arXiv 2409.13548): what goes is all whose score is at the percentile or below, with numpy's linear interpolation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from megarewarm.data.files.document_table import read_table, table_path
from megarewarm.errors import UserError
from megarewarm.files import sha256
from megarewarm.selection.desk import Desk, kept_key
from megarewarm.selection.digests import digests, ranks
from megarewarm.selection.score_file import file_losses
from megarewarm.selection.scoring_model import ScoringModel
from megarewarm.selection.step import Chosen, Corpus, Examples, Mask, Numbers

Scores = npt.NDArray[np.float64]
End = Literal["drop-easiest", "drop-hardest", "keep-middle"]

_EXAMPLES = 3


class ScoreSource(Protocol):
    """Scores of documents. ``name``: what they are, for people; ``settings``: what they depend on."""

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> Mapping[str, Any]: ...

    def scores(self, corpus: Corpus, kept: Mask, index: int, desk: Desk) -> Scores:
        """Of the ``kept`` documents of file ``index``, NaN without. Raises ``UserError``."""


class LossOf:
    """The loss by ``model``, less that by ``minus``."""

    def __init__(self, model: ScoringModel, minus: ScoringModel | None = None) -> None:
        self._models = [model] if minus is None else [model, minus]
        self.name = f"loss by {model.name}" + (f" less that by {minus.name}" if minus is not None else "")

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"loss": [model.identity for model in self._models]}

    def scores(self, corpus: Corpus, kept: Mask, index: int, desk: Desk) -> Scores:
        file = corpus.files[index]
        for model in self._models:
            model.check_reads(file)
        documents = corpus.members(kept, index)
        # in the order of contents, since the last bits of a loss depend on what is computed beside it
        place = ranks(digests(corpus, desk), documents)
        ordered = documents[np.argsort(place)] - corpus.firsts[index]
        depends = {"file": index, "kept": kept_key(kept)}
        losses = [file_losses(file, ordered, model, desk, depends)[place] for model in self._models]
        return losses[0] if len(losses) == 1 else losses[0] - losses[1]


class ScoresInFile:
    """Those of megarewarm score-data, of the only file of ``corpus``. Raises ``UserError``."""

    def __init__(self, path: str, corpus: Corpus) -> None:
        if len(corpus.files) > 1:
            raise UserError(f"--score {path}: is of one token file; select from several one after another")
        self._table = read_table(path, "scores", corpus.files[0])
        self.name = f"{self._table.about.get('name', 'score')} in {path}"
        self._digest = sha256(table_path(path))

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"file": self._digest, **self._table.about}

    def scores(self, corpus: Corpus, kept: Mask, index: int, desk: Desk) -> Scores:
        return self._table.values[corpus.members(kept, index) - corpus.firsts[index]].astype(np.float64)


class ByPercentile:
    """Drops by percentiles of each file's scores. ``share``: that is dropped at the end of the lowest scores (drop-easiest) or
    of the highest (drop-hardest), or that is kept between both (keep-middle). Documents without a score stay."""

    name = "score"

    def __init__(self, source: ScoreSource, end: End, share: float) -> None:
        self._source, self._end, self._share = source, end, share
        verb, part = end.split("-")
        self.words = f"{verb} the {part} {100 * share:.4g} % of each input's documents by {source.name}"

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"end": self._end, "share": self._share, **self._source.settings}

    def choose(self, corpus: Corpus, kept: Mask, desk: Desk) -> Chosen:
        dropped: list[Numbers] = [np.empty(0, np.int64)]
        scores: list[Scores] = [np.empty(0)]
        notes: list[str] = []
        examples: list[Examples] = []
        for index, file in enumerate(corpus.files):
            documents, found = corpus.members(kept, index), self._source.scores(corpus, kept, index, desk)
            gone, limits = beyond(found, self._end, self._share)
            where, scored = file.path.stem, int(np.isfinite(found).sum())
            if scored and gone.sum() == scored:
                raise UserError(
                    f"--{self._end} {self._share:.4g}: none of the {scored:,} documents of {where} with a score would stay "
                    f"({limits}); choose another share"
                )
            notes.append(f"{where}: {int(gone.sum()):,} of {scored:,} documents go{limits and f', {limits}'}")
            if scored < len(found):
                notes.append(f"{where}: {len(found) - scored:,} documents without a score stay")
            dropped.append(documents[gone])
            scores.append(found[gone])
            order = np.argsort(np.where(np.isfinite(found), found, np.inf), kind="stable")[:scored]
            for title, ends in (("lowest", order[:_EXAMPLES]), ("highest", order[::-1][:_EXAMPLES])):
                examples.append(Examples(f"{where}: the {title} scores", documents[ends], found[ends]))
        chosen = np.concatenate(dropped)
        return Chosen(chosen, np.full(len(chosen), -1), np.concatenate(scores), notes, examples=examples)


def beyond(scores: Scores, end: End, share: float) -> tuple[Mask, str]:
    """(which ``scores`` go, (n,) bool; the limits, for people). See ``ByPercentile``; equal scores share their fate."""
    there = scores[np.isfinite(scores)]
    gone = np.zeros(len(scores), bool)
    limits = []
    low = share if end == "drop-easiest" else (1 - share) / 2 if end == "keep-middle" else 0.0
    high = share if end == "drop-hardest" else (1 - share) / 2 if end == "keep-middle" else 0.0
    if not len(there):
        return gone, ""
    # a comparison with NaN is False
    if low > 0:
        limit = np.percentile(there, 100 * low)
        gone |= scores <= limit
        limits.append(f"at {limit:.4f} or below")
    if high > 0:
        limit = np.percentile(there, 100 * (1 - high))
        gone |= scores >= limit
        limits.append(f"at {limit:.4f} or above")
    return gone & np.isfinite(scores), " and ".join(limits)
