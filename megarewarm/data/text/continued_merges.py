"""Training of a byte-pair encoding that goes on from merges there are: the commonest pair of neighbours is merged, again and
again (Sennrich et al. 2016; continued on new text: arXiv 2512.03989). Counts of pairs are kept up to date by each merge."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]


class NextMerge(NamedTuple):
    """``left`` and ``right``: ids of the tokens that become one; ``times``: how often they were neighbours then."""

    left: int
    right: int
    times: int


def continue_merges(
    words: Sequence[Sequence[int]],
    counts: Sequence[int],
    tokens: Mapping[int, str],
    first: int,
    most: int,
    least_count: int = 1,
    on_merge: Callable[[], object] = lambda: None,
) -> list[NextMerge]:
    """The next ``most`` merges on ``words``, ids of tokens on which all earlier merges were made, each with its count. Merge k
    makes the id ``first + k``. Fewer where no pair occurs ``least_count`` times. ``tokens``: the strings of ids; a pair that
    would make one of them again is left alone. Of pairs that occur equally often the one of the smaller ids comes first, as in
    'tokenizers'.
    """
    strings = dict(tokens)
    taken = set(strings.values())
    text = _LinkedWords(words, counts)
    queue = [(-count, *pair) for pair, count in text.pairs.items()]
    heapq.heapify(queue)
    merges: list[NextMerge] = []
    while queue and len(merges) < most:
        was, left, right = queue[0]
        count = text.pairs.get((left, right), 0)
        string = strings[left] + strings[right]
        if count < least_count or string in taken:
            heapq.heappop(queue)
            continue
        if count != -was:  # counts only fall, so its place in the queue is further back
            heapq.heapreplace(queue, (-count, left, right))
            continue
        heapq.heappop(queue)
        new = first + len(merges)
        for pair in text.merge(left, right, new):
            heapq.heappush(queue, (-text.pairs[pair], *pair))
        merges.append(NextMerge(left, right, count))
        strings[new] = string
        taken.add(string)
        on_merge()
    return merges


class _LinkedWords:
    """Words as one row of linked tokens. ``pairs``: how often each pair of neighbours occurs.

    A pair comes into being only when the newer of its two tokens does; from then on its count can only fall, and its places,
    which are recorded then, can only become fewer.
    """

    def __init__(self, words: Sequence[Sequence[int]], counts: Sequence[int]) -> None:
        long = [(word, count) for word, count in zip(words, counts, strict=True) if len(word) > 1]
        lengths = np.fromiter((len(word) for word, _ in long), np.int64, len(long))
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        self._token = np.fromiter(
            chain.from_iterable(word for word, _ in long), np.int64, total
        )  # -1: merged into the one before
        self._after = np.arange(1, total + 1)  # -1: the last of its word
        self._before = np.arange(-1, total - 1)  # -1: the first of its word
        self._after[ends - 1] = -1
        self._before[ends - lengths] = -1
        self._weight = np.repeat(np.fromiter((count for _, count in long), np.int64, len(long)), lengths)
        self.pairs: dict[tuple[int, int], int] = {}
        self._places: dict[tuple[int, int], Positions] = {}
        self._add(np.arange(total))

    def merge(self, left: int, right: int, new: int) -> list[tuple[int, int]]:
        """Make each ``left`` before a ``right`` ``new``, from the left; returns the pairs that came into being."""
        here = self._places.pop((left, right))
        after = self._after[here]
        here = here[(self._token[here] == left) & (after >= 0) & (self._token[after] == right)]
        if left == right:
            here = self._apart(here)
        gone = self._after[here]
        before = self._before[here]
        before = before[before >= 0]
        for pair, count, _ in self._grouped(np.unique(np.concatenate([before, here, gone]))):
            self.pairs[pair] -= count
        following = self._after[gone]
        self._token[here] = new
        self._after[here] = following
        follows = following >= 0
        self._before[following[follows]] = here[follows]
        self._token[gone] = -1
        before = self._before[here]
        return self._add(np.unique(np.concatenate([before[before >= 0], here])))

    def _apart(self, here: Positions) -> Positions:
        """Of places of pairs of equal tokens those that are merged: in a run every other one."""
        number = np.arange(len(here))
        goes_on = np.zeros(len(here), bool)
        goes_on[1:] = self._after[here[:-1]] == here[1:]
        begin = np.maximum.accumulate(np.where(goes_on, 0, number)) if len(here) else number
        return here[(number - begin) % 2 == 0]

    def _add(self, positions: Positions) -> list[tuple[int, int]]:
        added = []
        for pair, count, places in self._grouped(positions):
            self.pairs[pair] = count
            self._places[pair] = places
            added.append(pair)
        return added

    def _grouped(self, positions: Positions) -> list[tuple[tuple[int, int], int, Positions]]:
        """The pairs that begin at ``positions``, ascending and distinct: each with its count and places."""
        positions = positions[self._after[positions] >= 0]
        if not len(positions):
            return []
        keys = self._token[positions] << 32 | self._token[self._after[positions]]
        order = np.argsort(keys, kind="stable")
        keys, positions = keys[order], positions[order]
        first = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
        sums = np.add.reduceat(self._weight[positions], first).tolist()
        places = np.split(positions, first[1:])
        return [((key >> 32, key & 0xFFFFFFFF), *rest) for key, *rest in zip(keys[first].tolist(), sums, places, strict=True)]
