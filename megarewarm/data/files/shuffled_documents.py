"""Documents in any order as one row of tokens: which of them holds a given token, in little memory.

GPT-NeoX and Megatron-LM write down document and offset of every sample. Here the place is found when a sample is read: for
every 32nd document the tokens before it are known (int64), and for each document its size in 16 bits; the few of 65535 tokens
or more are in a table of their own. With the order itself that is 6.25 bytes for each document.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

_GROUP = 32  # documents between two known places
_LONG = 2**16 - 1  # stands for a size that is in the table
_BLOCK = 2**20  # documents in memory at a time while this is built


class ShuffledDocuments:
    """The documents of ``arrays``: those that ``arrays_of`` makes, under their names."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.order = arrays["order"]
        self._sizes, self._starts = arrays["sizes"], arrays["starts"]
        self._long_rows, self._long_sizes = arrays["long_rows"], arrays["long_sizes"]

    @staticmethod
    def arrays_of(
        order: npt.NDArray[np.signedinteger], sizes: npt.NDArray[np.int32], first: int | None
    ) -> dict[str, np.ndarray]:
        """``order``: (n,) document ids, kept as they are; ``sizes``: int32, the size of document ``first`` + i at i, or where
        ``first`` is None that of document ``order[i]``."""
        small = np.empty(-(-len(order) // _GROUP) * _GROUP, np.uint16)
        small[len(order) :] = 0
        starts = np.empty(len(small) // _GROUP, np.int64)
        long_rows, long_sizes, total = [], [], 0
        for begin in range(0, len(order), _BLOCK):
            block = sizes[begin : begin + _BLOCK] if first is None else sizes[order[begin : begin + _BLOCK] - first]
            (long,) = np.nonzero(block >= _LONG)
            long_rows.append(begin + long)
            long_sizes.append(block[long])
            small[begin : begin + len(block)] = np.minimum(block, _LONG)
            groups = np.add.reduceat(block, np.arange(0, len(block), _GROUP), dtype=np.int64)
            ends = total + np.cumsum(groups)
            starts[begin // _GROUP : begin // _GROUP + len(groups)] = ends - groups
            total = int(ends[-1])
        return {
            "order": order,
            "sizes": small,
            "starts": starts,
            "long_rows": np.concatenate(long_rows) if long_rows else np.empty(0, np.int64),
            "long_sizes": np.concatenate(long_sizes) if long_sizes else np.empty(0, np.int32),
        }

    def locate(self, tokens: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(row in ``order``, offset in its document) of flat tokens, each of their shape; empty documents hold none."""
        flat = np.asarray(tokens, np.int64)
        group = np.searchsorted(self._starts, flat, side="right") - 1
        inside = flat - self._starts[group]
        ends = np.cumsum(self.sizes(group[..., None] * _GROUP + np.arange(_GROUP)), axis=-1)
        place = (ends <= inside[..., None]).sum(axis=-1)
        before = np.take_along_axis(ends, np.maximum(place - 1, 0)[..., None], axis=-1)[..., 0]
        return group * _GROUP + place, inside - np.where(place > 0, before, 0)

    def pieces(
        self, tokens: npt.NDArray[np.int64], length: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(row, offset, length) of the parts of documents that make up the runs of ``length`` tokens from ``tokens`` (n,)
        on. One run after another; the lengths of n of them sum to n x ``length``."""
        (first, last), (begin, end) = self.locate(np.stack([tokens, tokens + length - 1]))
        counts = last - first + 1
        starts = np.cumsum(counts) - counts
        rows = np.arange(counts.sum()) + np.repeat(first - starts, counts)
        offsets = np.zeros(len(rows), np.int64)
        offsets[starts] = begin
        ends = self.sizes(rows)
        ends[starts + counts - 1] = end + 1
        return rows, offsets, ends - offsets

    def sizes(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens of the documents at ``rows``, of their shape."""
        sizes = self._sizes[rows].astype(np.int64)
        long = sizes == _LONG
        if long.any():
            sizes[long] = self._long_sizes[np.searchsorted(self._long_rows, rows[long])]
        return sizes
