"""Documents as points: the mean of a checkpoint's last states over a document's tokens, normalised to length 1.

Each source is in the order of its documents' contents, so that the input's order changes neither the points nor anything that
is computed from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megarewarm.data.files.token_file import TokenFile
from megarewarm.selection.desk import Desk, kept_key
from megarewarm.selection.digests import digests, ranks
from megarewarm.selection.scoring_model import ScoringModel, block_by_block
from megarewarm.selection.step import Corpus, Mask, Numbers

Points = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Embedded:
    """``points[i]``, (m, h) fp32 of length 1 on the disk, is that of document ``documents[i]`` of the corpus."""

    documents: Numbers
    points: Points

    def rows_of(self, kept: Mask) -> Numbers:
        """The rows of the ``kept`` documents, ascending: in the order of their contents."""
        return np.flatnonzero(kept[self.documents])


class Embedder:
    """Embeds each source once, for the steps that share it: the documents that are kept when the first of them asks."""

    def __init__(self, model: ScoringModel) -> None:
        self.model = model
        self._done: dict[int, Embedded] = {}

    def embedded(self, corpus: Corpus, kept: Mask, index: int, desk: Desk) -> Embedded:
        """The ``kept`` documents of file ``index``, at least, but for those without content. Raises ``UserError``."""
        found = self._done.get(index)
        if found is None:
            found = self._done[index] = self._embed(corpus, kept, index, desk)
        return found

    def _embed(self, corpus: Corpus, kept: Mask, index: int, desk: Desk) -> Embedded:
        file, model = corpus.files[index], self.model
        model.check_reads(file)
        documents = corpus.members(kept, index)
        sizes = content_sizes(file, documents - corpus.firsts[index], corpus.ends[index])
        documents, sizes = documents[sizes > 0], sizes[sizes > 0]
        order = np.argsort(ranks(digests(corpus, desk), documents))
        documents, sizes = documents[order], sizes[order]
        starts = file.starts_of(documents - corpus.firsts[index])
        make = block_by_block(
            sizes,
            file.dtype.itemsize,
            lambda done, total: desk.show(f"embedding {file.path.stem}", done, total),
            lambda some, progress: normalised(model.embeddings(file, starts[some], sizes[some], progress)),
        )
        depends = {**model.identity, "file": index, "kept": kept_key(kept)}
        points = desk.rows("points", depends, (len(documents), model.config.hidden_size), np.float32, make)
        return Embedded(documents, points)


def content_sizes(file: TokenFile, documents: Numbers, end: int | None) -> Numbers:
    """(n,) tokens of ``documents`` of ``file`` without the one that ends them."""
    sizes = file.sizes[documents]
    if end is None:
        return sizes
    for first in range(0, len(documents), 2**16):
        part = slice(first, first + 2**16)
        filled = first + np.flatnonzero(sizes[part])
        last = file.starts_of(documents[filled]) + sizes[filled] - 1
        sizes[filled] -= file.read_pieces(last, np.ones(len(last), np.int64)) == end
    return sizes


def normalised(points: npt.NDArray[Any]) -> Points:
    """``points`` (m, h) of length 1; those of length 0 stay."""
    exact = points.astype(np.float64)
    length = np.linalg.norm(exact, axis=1, keepdims=True)
    return np.divide(exact, length, out=exact, where=length > 0).astype(np.float32)
