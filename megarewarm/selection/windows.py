"""Documents cut into windows that a model reads one by one: windows of similar length together, so that little is padded and
no attention mask is needed (later positions don't change earlier ones)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megarewarm.data.files.token_file import TokenFile
from megarewarm.selection.step import Numbers


@dataclass(frozen=True)
class Windows:
    """Window i is the flat tokens [starts[i], starts[i] + lengths[i]) of document ``documents[i]``. Each (w,) int64."""

    documents: Numbers
    starts: Numbers
    lengths: Numbers

    def batches(self, tokens: int) -> Iterator[Windows]:
        """All windows, longest first, in batches of at most ``tokens`` positions with their padding, or of one window. A
        batch is padded by less than a quarter, or is of windows below 16 tokens."""
        order = np.argsort(-self.lengths, kind="stable")
        sorted_lengths = self.lengths[order]
        first = 0
        while first < len(order):
            longest = int(sorted_lengths[first])
            rows = max(1, tokens // longest)
            shortest = longest * 3 // 4 if longest > 16 else 1
            similar = int(np.searchsorted(-sorted_lengths, -shortest, side="right"))
            last = min(first + rows, similar)
            chosen = order[first:last]
            yield Windows(self.documents[chosen], self.starts[chosen], self.lengths[chosen])
            first = last


def cut(starts: Numbers, sizes: Numbers, length: int) -> Windows:
    """The windows of at most ``length`` tokens of documents at the flat positions ``starts``, of ``sizes`` tokens, (n,) both;
    ``documents`` counts from 0. Documents without tokens have none."""
    counts = -(-sizes // length)
    documents = np.repeat(np.arange(len(sizes)), counts)
    within = (np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)) * length
    return Windows(documents, starts[documents] + within, np.minimum(length, sizes[documents] - within))


def read_padded(file: TokenFile, windows: Windows, more: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """(ids (w, longest + more), which of the first ``longest`` positions are the window's (w, longest)): each window with
    the ``more`` tokens after it; padding is id 0."""
    lengths = windows.lengths + more
    own = np.arange(int(lengths.max()))[None, :] < lengths[:, None]
    ids = np.zeros(own.shape, np.int64)
    ids[own] = file.read_pieces(windows.starts, lengths)
    return ids, own[:, more:]
