"""Samples that an earlier stage of training has read, to be read again: a replay of what a lineage records."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from megarewarm.data.row_samples import RowSamples
from megarewarm.data.sample_order import SampleOrder, SamplesRead
from megarewarm.data.samples import MegatronSamples, NeoxSamples, PermutedSamples, Samples
from megarewarm.data.token_file import TokenFile, TokenView, open_tokens
from megarewarm.errors import UserError

Ranges = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class SeenSource:
    """A source of the samples ``seen`` (ascending, disjoint ranges of indices) in ``order`` of the file at ``path``.

    Reading begins at the ``first``-th of them and wraps around their end, so that a second replay goes on where an earlier one
    ended. ``pool``: the name under which it was read then; ``fingerprint``: of the file. ``max_epochs``: how often a sample may
    be replayed.
    """

    name: str
    pool: str
    path: str
    fingerprint: str
    order: SampleOrder
    seen: tuple[tuple[int, int], ...]
    first: int = 0
    weight: float = 1.0
    max_epochs: float | None = 1.0

    def with_weight(self, weight: float) -> SeenSource:
        """The same source with another share."""
        return replace(self, weight=weight)

    def open(self, vocab_size: int, sequence_length: int) -> SeenSamples:
        """The samples. Raises ``UserError`` where the file is gone or another one, or the sequences are of another length."""
        order = self.order
        if order.sequence_length != sequence_length:
            raise UserError(
                f"replay of lineage: '{self.pool}' was read in sequences of {order.sequence_length} tokens, this run's "
                f"data.sequence_length is {sequence_length}: make it {order.sequence_length}, or give replay.sources"
            )
        try:
            file = open_tokens(self.path, dtype=order.dtype)
        except UserError as error:
            raise UserError(
                f"replay of lineage: '{self.pool}': {error}; if it has moved, say where in replay.paths: "
                f"{{{self.pool}: NEW_PATH}}"
            ) from error
        if file.fingerprint() != self.fingerprint:
            raise UserError(
                f"replay of lineage: {file.path} is not the file that was read as '{self.pool}' (fingerprint "
                f"{file.fingerprint()[:8]}, then {self.fingerprint[:8]}): say where that one is in replay.paths"
            )
        file.check_vocabulary(vocab_size)
        return SeenSamples(_reopen(order, file), self.seen, self.first, self.max_epochs)


class SeenSamples(Samples):
    """Sample i is the (``first`` + i)-th of those that were ``seen`` of ``original``, counted around."""

    def __init__(self, original: Samples, seen: Ranges, first: int, max_epochs: float | None) -> None:
        super().__init__(original.tokens, original.sequence_length)
        self._original, self._seen, self._first = original, list(seen), first
        self._before = np.cumsum([0] + [last - begin for begin, last in seen])
        self.samples_per_epoch = int(self._before[-1])
        self.num_samples = None if max_epochs is None else math.floor(max_epochs * self.samples_per_epoch)
        self.order = f"replay of {self.sample_order().model_dump_json()} {self._seen} from {first}"
        self.least_tokens = 1

    def sample_order(self) -> SampleOrder:
        return self._original.sample_order()

    def read_between(self, first: int, last: int) -> SamplesRead:
        ranges: list[tuple[int, int]] = []
        while first < last:
            place = (self._first + first) % self.samples_per_epoch
            k = bisect_right(self._before.tolist(), place) - 1
            begin = self._seen[k][0] + place - int(self._before[k])
            count = min(last - first, self._seen[k][1] - begin)
            ranges.append((begin, begin + count))
            first += count
        return SamplesRead(order=self.sample_order(), ranges=tuple(ranges), again=True)

    def pieces(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        places = (self._first + indices) % self.samples_per_epoch
        k = np.searchsorted(self._before, places, side="right") - 1
        begins = np.array([begin for begin, _ in self._seen])
        return self._original.pieces(begins[k] + places - self._before[k])


def _reopen(order: SampleOrder, file: TokenFile) -> Samples:
    view: TokenView = file.view(order.first_document, order.last_document)
    match order.kind:
        case "permuted":
            return PermutedSamples(view, order.sequence_length, order.key, None)
        case "rows":
            return RowSamples(view, order.sequence_length, order.first_row, None)
        case "neox":
            return NeoxSamples(view, order.sequence_length, order.key, 1, epoch_ranges=order.epochs)
        case "megatron":
            return MegatronSamples(view, order.sequence_length, order.key, 1, epoch_ranges=order.epochs)


def union(ranges: Ranges) -> tuple[tuple[int, int], ...]:
    """The ranges [first, last) as ascending, disjoint ones that hold the same numbers."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if first >= last:
            continue
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return tuple(merged)
