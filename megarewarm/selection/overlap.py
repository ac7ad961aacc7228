"""Finds documents that share n-grams with other texts: how many of each document's own, and how much of one of the others.

The grams of the others are kept sorted in memory, 2**25 at a time; larger texts take several passes, each over a part of the
hashes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megarewarm.selection.desk import Desk
from megarewarm.selection.ngrams import Hashes, ngrams
from megarewarm.selection.step import Block, Corpus, Numbers

GRAM = 13
MOST = 2**25
"""Grams of the other texts in memory at a time."""
_SIEVE_BITS = 27
_OWNERS = 16
"""Of a gram that more of the other documents hold, so many are counted as holding it: boilerplate would pair all with all."""


@dataclass(frozen=True)
class OtherText:
    """Some of the other documents, or pieces of such: as in ``Block``; ``numbers``: of the documents, (documents,)."""

    numbers: Numbers
    ids: npt.NDArray[Any]
    starts: Numbers
    sizes: Numbers


@dataclass(frozen=True)
class Overlap:
    """Of each of some documents: the share of its grams that the others hold, and the largest share of the distinct grams of
    one of the others that it holds, with the number of that one (-1 for none); (documents,) each."""

    own: npt.NDArray[np.float64]
    of_other: npt.NDArray[np.float64]
    other: Numbers


def overlap(
    corpus: Corpus,
    documents: Numbers,
    texts: Callable[[], Iterable[OtherText]],
    tokens: int,
    desk: Desk,
    doing: str,
    *,
    of_others: bool = True,
) -> Overlap:
    """How each of ``documents`` overlaps with ``texts()``, which hold ``tokens`` tokens. ``of_others``: not only how much of
    its own. Memory: 48 bytes for each of up to ``MOST`` grams while they are sorted, 40 for each of ``documents``."""
    passes = max(1, -(-tokens // MOST))
    total = corpus.bytes_of(documents) * passes
    hits, grams = np.zeros(len(documents), np.int64), np.zeros(len(documents), np.int64)
    found: list[npt.NDArray[np.int64]] = []
    sizes: list[tuple[Numbers, Numbers]] = []
    none, done = np.full(len(documents), -1, np.int64), 0
    for number in range(passes):
        index = _Index(_part(texts(), number, passes))
        if of_others:
            sizes.append(index.sizes())
        at = 0
        for block in corpus.blocks(documents):
            last = at + len(block.documents)
            mine, owners = _grams(block, number, passes)
            grams[at:last] += np.bincount(owners, minlength=last - at)
            places = index.find(mine)
            shared = places >= 0
            hits[at:last] += np.bincount(owners[shared], minlength=last - at)
            if of_others:
                found.append(index.pairs(places[shared], owners[shared] + at))
            at = last
            done += block.ids.nbytes
            desk.show(doing, done, total)
    share, other = _largest(found, sizes, len(documents)) if of_others else (np.zeros(len(documents)), none)
    return Overlap(hits / np.maximum(grams, 1), share, other)


def _part(texts: Iterable[OtherText], number: int, passes: int) -> Iterator[tuple[Hashes, Numbers]]:
    for text in texts:
        grams, owners = _grams(text, number, passes)
        yield grams, text.numbers[owners]


def _grams(text: OtherText | Block, number: int, passes: int) -> tuple[Hashes, Numbers]:
    """(the grams of this pass, the place of the document of each), in the order of the text."""
    grams, bounds = ngrams(text.ids, text.starts, text.sizes, GRAM)
    owners = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    if passes == 1:
        return grams, owners
    mine = grams % np.uint64(passes) == number
    return grams[mine], owners[mine]


class _Index:
    """(gram, document) pairs of the others, sorted by gram; a sieve says at once that most grams are not among them."""

    def __init__(self, parts: Iterator[tuple[Hashes, Numbers]]) -> None:
        gathered = list(parts)
        grams = np.concatenate([np.empty(0, np.uint64), *(part for part, _ in gathered)])
        owners = np.concatenate([np.empty(0, np.int64), *(part for _, part in gathered)])
        del gathered
        order = np.argsort(grams, kind="stable")  # the owners of a gram stay in their order
        grams, owners = grams[order], owners[order]
        new = np.concatenate([[True], (grams[1:] != grams[:-1]) | (owners[1:] != owners[:-1])])[: len(grams)]
        grams, owners = grams[new], owners[new]
        self._sizes = np.unique(owners, return_counts=True)
        few = np.ones(len(grams), bool)
        few[_OWNERS:] = grams[_OWNERS:] != grams[:-_OWNERS]
        self._grams, self._owners = grams[few], owners[few]
        self._sieve = np.zeros(2**_SIEVE_BITS // 8, np.uint8)
        places = self._grams >> np.uint64(64 - _SIEVE_BITS)
        np.bitwise_or.at(self._sieve, (places >> np.uint64(3)).astype(np.intp), _bit(places))

    def sizes(self) -> tuple[Numbers, Numbers]:
        """(numbers of the others, how many distinct grams each has here)."""
        return self._sizes

    def find(self, grams: Hashes) -> Numbers:
        """The first place of each gram, -1 where it isn't there."""
        places = np.full(len(grams), -1, np.int64)
        bits = grams >> np.uint64(64 - _SIEVE_BITS)
        maybe = np.flatnonzero(self._sieve[(bits >> np.uint64(3)).astype(np.intp)] & _bit(bits))
        at = np.searchsorted(self._grams, grams[maybe])
        there = at < len(self._grams)
        there[there] = self._grams[at[there]] == grams[maybe[there]]
        places[maybe[there]] = at[there]
        return places

    def pairs(self, places: Numbers, documents: Numbers) -> npt.NDArray[np.int64]:
        """(k, 3): document, other document, and how many distinct grams they share."""
        order = np.lexsort((places, documents))
        places, documents = places[order], documents[order]
        new = np.concatenate([[True], (places[1:] != places[:-1]) | (documents[1:] != documents[:-1])])[: len(places)]
        places, documents = places[new], documents[new]
        ends = np.searchsorted(self._grams, self._grams[places], side="right")
        counts = ends - places
        mine = np.repeat(documents, counts)
        before = np.repeat(np.cumsum(counts) - counts, counts)
        theirs = self._owners[np.repeat(places, counts) + np.arange(int(counts.sum())) - before]
        return _summed(np.stack([mine, theirs, np.ones(len(mine), np.int64)], 1))


def _bit(places: Hashes) -> npt.NDArray[np.uint8]:
    return (np.uint8(1) << (places & np.uint64(7)).astype(np.uint8)).astype(np.uint8)


def _summed(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Rows of (document, other, count) with the counts of equal pairs added."""
    order = np.lexsort((rows[:, 1], rows[:, 0]))
    rows = rows[order]
    new = np.flatnonzero(np.concatenate([[True], (rows[1:, :2] != rows[:-1, :2]).any(1)])[: len(rows)])
    if not len(new):
        return rows
    return np.column_stack([rows[new, :2], np.add.reduceat(rows[:, 2], new)])


def _largest(
    found: list[npt.NDArray[np.int64]], sizes: list[tuple[Numbers, Numbers]], count: int
) -> tuple[npt.NDArray[np.float64], Numbers]:
    """For each document the largest share of another one's grams that it holds, and that one; of equal shares the first."""
    rows = _summed(np.concatenate([np.empty((0, 3), np.int64), *found]))
    numbers, place = np.unique(np.concatenate([numbers for numbers, _ in sizes]), return_inverse=True)
    whole = np.bincount(place, np.concatenate([counts for _, counts in sizes]), minlength=len(numbers))
    share, other = np.zeros(count), np.full(count, -1, np.int64)
    if len(rows):
        shares = rows[:, 2] / whole[np.searchsorted(numbers, rows[:, 1])]
        order = np.lexsort((rows[:, 1], -shares, rows[:, 0]))
        first = order[np.concatenate([[True], rows[order][1:, 0] != rows[order][:-1, 0]])]
        share[rows[first, 0]], other[rows[first, 0]] = shares[first], rows[first, 1]
    return share, other
