"""Drops documents that are tested: those that overlap with token files which a run is validated on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megarewarm.data.files.file_identity import identity_of
from megarewarm.data.files.manifest import refuse_other_tokenizers
from megarewarm.selection.desk import Desk
from megarewarm.selection.opening import made, open_corpus
from megarewarm.selection.overlap import GRAM, OtherText, Overlap, overlap
from megarewarm.selection.step import Chosen, Corpus, Counterpart, Mask, Numbers

_SHOWN = 20
_LEAST = 1e-9

Shares = npt.NDArray[np.float64]


class Unlike:
    """``paths``: token files that documents of ``corpus`` are not to be like; ``share``: of n-grams, from which on a document
    goes. Raises ``UserError`` for files that can't be read, or whose tokenizers differ from the corpus's."""

    name = "unlike"

    def __init__(self, paths: Sequence[str], share: float, corpus: Corpus) -> None:
        self._tested, self._share = open_corpus(paths), share
        refuse_other_tokenizers(made([*corpus.files, *self._tested.files]))
        self.words = (
            f"drop documents of which at least {share:.0%} of the {GRAM}-grams of tokens are in {', '.join(paths)}, or that "
            f"hold at least {share:.0%} of those of one document there"
        )
        self.settings: Mapping[str, Any] = {
            "files": [identity_of(file).model_dump() for file in self._tested.files],
            "ends": list(self._tested.ends),
            "share": share,
            "gram": GRAM,
        }

    def choose(self, corpus: Corpus, kept: Mask, desk: Desk) -> Chosen:
        documents = np.flatnonzero(kept)
        tested = self._tested
        found = overlap(corpus, documents, self._texts, int(tested.sizes.sum()), desk, "overlap with tested files")
        return chosen(documents, np.maximum(found.own, found.of_other), self._share, self._shown(documents, found))

    def _texts(self) -> Iterator[OtherText]:
        for block in self._tested.blocks(np.arange(self._tested.num_documents)):
            yield OtherText(block.documents, block.ids, block.starts, block.sizes)

    def _shown(self, documents: Numbers, found: Overlap) -> list[Counterpart]:
        """Those that share most of one tested document, beside it."""
        best = np.flatnonzero(found.of_other >= max(self._share, _LEAST))
        best = best[np.argsort(-found.of_other[best], kind="stable")][:_SHOWN]
        shown = []
        for document, other in zip(documents[best].tolist(), found.other[best].tolist(), strict=True):
            index = int(self._tested.file_of(np.array([other]))[0])
            place = f"{self._tested.files[index].path}, document {other - int(self._tested.firsts[index]):,}"
            shown.append(Counterpart(document, place, self._tested.content(other)))
        return shown


def chosen(documents: Numbers, overlaps: Shares, share: float, beside: Sequence[Counterpart] = ()) -> Chosen:
    """Those of ``documents`` go whose overlap with others is at least ``share``, and above 0. ``beside``: for the page."""
    gone = (overlaps >= share) & (overlaps > 0)
    below = overlaps[(overlaps > 0) & ~gone]
    notes = []
    if len(below):
        notes.append(f"{len(below):,} documents that stay share at least one {GRAM}-gram, the most {below.max():.1%}")
    return Chosen(documents[gone], np.full(int(gone.sum()), -1, np.int64), overlaps[gone], notes, beside=beside)
