"""Rows of whole documents: no document begins in one row and ends in another, unless it is longer than a row.

A document longer than a row's s + 1 ids is cut into whole rows and a rest. Rests and shorter documents are put together by
best fit. What is left of a row is padding, which has no loss; the rows say where documents begin (``packed_rows``).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megarewarm.data.files.token_file import TokenView
from megarewarm.data.order.array_cache import Arrays, cached
from megarewarm.data.order.packing import best_fit
from megarewarm.data.order.sample_order import SampleOrder
from megarewarm.data.order.samples import CACHED, Samples, permuted
from megarewarm.errors import UserError
from megarewarm.packed_rows import PAD, begun

_BLOCK = 2**20  # documents that are packed together

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """What packing made of ``documents`` with ``tokens``: ``rows`` of ``room`` ids, ``cut`` documents in several of them.
    ``cut_in_stream``: those that windows one after another would cut."""

    documents: int
    tokens: int
    rows: int
    room: int
    cut: int
    cut_in_stream: int

    @property
    def padding(self) -> float:
        """Share of the rows' places that hold no token."""
        return 1 - self.tokens / (self.rows * self.room)

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents in {self.rows:,} rows, {self.padding:.2%} of their places padding, without loss; "
            f"{self.cut:,} documents are cut, the stream would cut {self.cut_in_stream:,}"
        )


class PackedSamples(Samples):
    """Sample i is row i mod R of the R rows that the view's documents make, permuted by a key from (``seed``, epoch) in each
    epoch floor(i / R); ``seed`` None: in the order of their first documents. ``samples_per_epoch`` is R, ``max_epochs`` as in
    ``PermutedSamples``.

    Each million documents are packed for themselves, so that making the rows takes 12 bytes per document and 8 per row, and
    no more than some 200 MB beside that. Rows of many documents are kept on the disk and mapped.
    """

    least_tokens = 1
    is_packed = True

    def __init__(self, tokens: TokenView, sequence_length: int, seed: int | None, max_epochs: float | None = 1.0) -> None:
        super().__init__(tokens, sequence_length)
        self._seed = seed
        self.order = f"packed by best fit 1, {'sequential' if seed is None else 'permuted'}"
        arrays = cached(self._cache_key(), self._make) if tokens.num_documents >= CACHED else self._make()
        self._starts, self._lengths, self._bounds = arrays["starts"], arrays["lengths"], arrays["bounds"]
        self.samples_per_epoch = len(self._bounds) - 1
        if self._lengths.max() < 2:
            raise UserError(
                f"{tokens.file.path}: no document has two tokens, so its packed rows have nothing to predict; "
                f"remove data.pack, or the source"
            )
        self.num_samples = None if max_epochs is None else math.floor(max_epochs * self.samples_per_epoch)
        cut, cut_in_stream = arrays["cut"].tolist()
        self.packing = Packing(
            tokens.num_documents, tokens.num_tokens, self.samples_per_epoch, sequence_length + 1, cut, cut_in_stream
        )

    def _cache_key(self) -> dict[str, Any]:
        digest, view = hashlib.blake2b(digest_size=16), self.tokens
        for first in range(view.first_document, view.last_document, _BLOCK):
            last = min(first + _BLOCK, view.last_document)
            documents = view.in_file(np.arange(first, last))
            digest.update(view.sizes_between(first, last).tobytes() + view.file.starts_of(documents).tobytes())
        return {"version": 2, "what": "packed", "documents": digest.hexdigest(), "room": self.sequence_length + 1}

    def _make(self) -> Arrays:
        view = self.tokens
        parts, cut, tokens = [], np.zeros(2, np.int64), 0
        for first in range(view.first_document, view.last_document, _BLOCK):
            last = min(first + _BLOCK, view.last_document)
            sizes = view.sizes_between(first, last).astype(np.int64)
            starts = view.file.starts_of(view.in_file(np.arange(first, last)))
            parts.append(_packed(sizes, starts, self.sequence_length + 1))
            begins = tokens + np.cumsum(sizes) - sizes
            # a window begins with the last token of the one before it, so the last but one says in which a document ends
            crossing = (sizes > 1) & (begins // self.sequence_length != (begins + sizes - 2) // self.sequence_length)
            cut += np.count_nonzero(sizes > self.sequence_length + 1), np.count_nonzero(crossing)
            tokens += int(sizes.sum())
        starts, lengths, counts = (np.concatenate(each) for each in zip(*parts, strict=True))
        return {"starts": starts, "lengths": lengths, "bounds": np.concatenate([[0], np.cumsum(counts)]), "cut": cut}

    def sample_order(self) -> SampleOrder:
        if self._seed is None:
            return self._sample_order("sequential", packed=True)
        return self._sample_order("permuted", key=self._seed, packed=True)

    @property
    def grid(self) -> Hashable:
        order = self.sample_order()
        return "packed", self.tokens.documents_of, order.documents, order.scores, order.descending, self.sequence_length

    def windows(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        if self._seed is None:
            return indices % self.samples_per_epoch
        return permuted(indices, self.samples_per_epoch, self._seed)

    def pieces(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """As ``Samples.pieces``, but for padding: the lengths of a row sum to at most s + 1."""
        where, _ = self._pieces_of(indices)
        return self._starts[where], self._lengths[where].astype(np.int64)

    def _pieces_of(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(numbers of the pieces of these samples, one after another; how many each has)."""
        rows = self.windows(indices)
        firsts, counts = self._bounds[rows], self._bounds[rows + 1] - self._bounds[rows]
        return np.repeat(firsts - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum())), counts

    def fill(self, indices: npt.NDArray[np.int64], out: npt.NDArray[np.int64]) -> None:
        self._check(indices)
        if not indices.size:
            return
        where, counts = self._pieces_of(indices)
        lengths = self._lengths[where].astype(np.int64)
        ends = np.cumsum(lengths)
        of_row = np.repeat(np.arange(len(indices)), counts)
        before_row = np.concatenate([[0], ends])[np.cumsum(counts) - counts]
        places = of_row * out.shape[1] + (ends - lengths) - before_row[of_row]
        flat = np.full(out.size, PAD, np.int64)
        flat[np.repeat(places - (ends - lengths), lengths) + np.arange(int(ends[-1]))] = self.tokens.file.read_pieces(
            self._starts[where], lengths
        )
        flat[places] = begun(flat[places])
        out[:] = flat.reshape(out.shape)


def _packed(sizes: Numbers, starts: Numbers, room: int) -> tuple[Numbers, npt.NDArray[np.int32], Numbers]:
    """Documents of ``sizes`` at the flat tokens ``starts``, (n,) each, in rows of ``room`` ids: (first tokens, lengths) of the
    pieces, row after row, and the pieces of each row. Rows are in the order of their first documents, pieces in the documents'.
    """
    whole, rest = np.divmod(sizes, room)
    (short,) = np.nonzero(rest)
    row_of_short, packed = best_fit(rest[short], room)
    full = int(whole.sum())
    within = room * (np.arange(full) - np.repeat(np.cumsum(whole) - whole, whole))
    document = np.concatenate([np.repeat(np.arange(len(sizes)), whole), short])
    inside = np.concatenate([within, whole[short] * room])
    row = np.concatenate([np.arange(full), full + row_of_short])
    place = (np.cumsum(sizes) - sizes)[document] + inside  # in the row of all tokens, so all are different
    first = np.full(full + packed, np.iinfo(np.int64).max)
    np.minimum.at(first, row, place)
    rows = np.argsort(first)
    rank = np.empty_like(rows)
    rank[rows] = np.arange(len(rows))
    order = np.lexsort((place, rank[row]))
    lengths = np.concatenate([np.full(full, room), rest[short]])[order].astype(np.int32)
    return (starts[document] + inside)[order], lengths, np.bincount(rank[row], minlength=len(rows))
