"""The sets of n-grams of single documents, and how much two of them share."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from megarewarm.selection.ngrams import Hashes, ngrams
from megarewarm.selection.step import Corpus

_KEPT = 2**24  # hashes kept in memory, 128 MiB


class GramSets:
    """The sets of ``n``-grams of a corpus's documents, the newest ones kept in memory."""

    def __init__(self, corpus: Corpus, n: int) -> None:
        self._corpus, self._n = corpus, n
        self._kept: OrderedDict[int, Hashes] = OrderedDict()
        self._size = 0

    def of(self, document: int) -> Hashes:
        """The distinct hashes of a document, ascending."""
        if document in self._kept:
            self._kept.move_to_end(document)
            return self._kept[document]
        ids = self._corpus.content(document)
        found = np.unique(ngrams(ids, np.zeros(1, np.int64), np.array([ids.size]), self._n)[0])
        self._kept[document] = found
        self._size += found.size
        while self._size > _KEPT and len(self._kept) > 2:
            self._size -= self._kept.popitem(last=False)[1].size
        return found

    def jaccard(self, one: int, other: int) -> float:
        """|A and B| / |A or B| of the sets of two documents; 0 where both are empty."""
        a, b = self.of(one), self.of(other)
        both = np.intersect1d(a, b, assume_unique=True).size
        return both / (a.size + b.size - both) if a.size or b.size else 0.0
