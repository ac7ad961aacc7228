"""Samples that earlier stages of training have read, to be read again: a replay of what a lineage records.

The samples are a set. Stages may have read a file in several orders, or for several epochs: a sample is in the set once, where
it was read first, and one that shares tokens with a sample before it is none of the set.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megarewarm.data.files.document_table import DocumentTable, TableUsed, read_table, used
from megarewarm.data.files.document_table import Kind as TableKind
from megarewarm.data.files.file_identity import FileIdentity, identity_of
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.files.listed_documents import by_score, listed
from megarewarm.data.files.token_file import TokenFile, TokenView
from megarewarm.data.order.array_cache import cached
from megarewarm.data.order.packed_samples import PackedSamples
from megarewarm.data.order.row_samples import RowSamples
from megarewarm.data.order.sample_order import SampleOrder, SamplesRead
from megarewarm.data.order.samples import MegatronSamples, NeoxSamples, PermutedSamples, Samples, SequentialSamples
from megarewarm.errors import UserError

Ranges = Sequence[tuple[int, int]]
Numbers = npt.NDArray[np.int64]

_BLOCK = 2**18  # samples looked at at a time
_CACHED = 2**21  # samples from which on the set is kept on the disk
_MOST_TOKENS = 2**33  # of a file in which single tokens are marked, a byte each


@dataclass(frozen=True)
class SeenPart:
    """The samples ``seen`` (ascending, disjoint ranges of indices) in one ``order``."""

    order: SampleOrder
    seen: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class SeenSource:
    """A source of the samples of all ``parts``, one after another, of the file at ``path``.

    ``ended``: (part, index) at which the last replay of them ended, where reading goes on; it wraps around their end. ``pool``:
    the name under which the file was read then; ``file``: what it held. ``max_epochs``: how often a sample may be replayed.
    """

    name: str
    pool: str
    path: str
    file: FileIdentity
    parts: tuple[SeenPart, ...]
    ended: tuple[int, int] | None = None
    weight: float = 1.0
    max_epochs: float | None = 1.0

    def with_weight(self, weight: float) -> SeenSource:
        """The same source with another share."""
        return replace(self, weight=weight)

    def open(self, files: TokenFiles) -> SeenSamples:
        """The samples. Raises ``UserError`` if the file is gone or another one, or the sequences are of another length."""
        sequence_length = files.data.sequence_length
        for order in (part.order for part in self.parts):
            if order.sequence_length != sequence_length:
                raise UserError(
                    f"replay of lineage: '{self.pool}' was read in sequences of {order.sequence_length} tokens, this run's "
                    f"data.sequence_length is {sequence_length}: make it {order.sequence_length}, or give replay.sources"
                )
        try:
            opened = {part.order.dtype: files.open(self.path, part.order.dtype) for part in self.parts}
        except UserError as error:
            raise UserError(
                f"replay of lineage: '{self.pool}': {error}; if it has moved, say where in replay.paths: "
                f"{{{self.pool}: NEW_PATH}}"
            ) from error
        for file in opened.values():
            if not (now := identity_of(file)).agrees_with(self.file):
                raise UserError(
                    f"replay of lineage: {file.path} is not the file that was read as '{self.pool}' (fingerprint "
                    f"{now.differing(self.file)}): say where that one is in replay.paths"
                )
            files.check(file)
        if any(part.order.packed for part in self.parts) and files.data.pack is None:
            raise UserError(
                f"replay of lineage: '{self.pool}' was read in rows of whole documents, which this run does not read: set "
                f"data.pack to best_fit, or give replay.sources"
            )
        originals = [reopen(part.order, opened[part.order.dtype]) for part in self.parts]
        return SeenSamples(originals, [part.seen for part in self.parts], self.ended, self.max_epochs)


class SeenSamples(Samples):
    """Sample i is the i-th of those that were ``seen`` of the ``originals``, each once, from where the last replay ``ended``
    on, counted around."""

    def __init__(
        self,
        originals: Sequence[Samples],
        seen: Sequence[Ranges],
        ended: tuple[int, int] | None = None,
        max_epochs: float | None = 1.0,
    ) -> None:
        super().__init__(originals[0].tokens, originals[0].sequence_length)
        self._originals = list(originals)
        self.is_packed = any(each.is_packed for each in originals)
        self._members = _members(originals, seen)
        self._ends = np.cumsum([len(members) for members in self._members])
        self.samples_per_epoch = int(self._ends[-1])
        self.first = 0 if ended is None else self._rank(*ended) % self.samples_per_epoch
        self.num_samples = None if max_epochs is None else math.floor(max_epochs * self.samples_per_epoch)
        if len(originals) == 1 and isinstance(self._members[0], _Ranged):
            self.order = f"replay of {self.sample_order().model_dump_json()} {list(seen[0])} from {self.first}"
        else:
            told = [f"{each.sample_order().model_dump_json()} {list(mine)}" for each, mine in zip(originals, seen, strict=True)]
            self.order = f"replay of {told}, each sample once, from {self.first}"
        self.least_tokens = 1

    def sample_order(self) -> SampleOrder:
        return self._originals[0].sample_order()

    def read_between(self, first: int, last: int) -> SamplesRead:
        """A record of the samples [first, last): where they lie in the order in which the last of them was first read."""
        ranges: list[tuple[int, int]] = []
        part = 0
        while first < last:
            place = (self.first + first) % self.samples_per_epoch
            now = int(np.searchsorted(self._ends, place, side="right"))
            if now != part:
                ranges, part = [], now
            place -= self._begin(part)
            begin, end, count = self._members[part].run(place, last - first)
            ranges.append((begin, end))
            first += count
        return SamplesRead(order=self._originals[part].sample_order(), ranges=tuple(ranges), again=True)

    def pieces(self, indices: Numbers) -> tuple[Numbers, Numbers]:
        found = [self._originals[part].pieces(inner) for part, inner, _ in self._by_part(indices)]
        return np.concatenate([starts for starts, _ in found]), np.concatenate([lengths for _, lengths in found])

    def fill(self, indices: Numbers, out: npt.NDArray[np.int64]) -> None:
        if not self.is_packed:
            return super().fill(indices, out)
        self._check(indices)
        for part, inner, rows in self._by_part(indices) if indices.size else ():
            self._originals[part].fill(inner, out[rows])

    def _by_part(self, indices: Numbers) -> Iterator[tuple[int, Numbers, slice]]:
        """(part, indices in its order, places among ``indices``) of runs of one part."""
        places = (self.first + indices) % self.samples_per_epoch
        parts = np.searchsorted(self._ends, places, side="right")
        for begin, end in pairwise([0, *(np.flatnonzero(np.diff(parts)) + 1).tolist(), len(parts)]):
            part = int(parts[begin])
            yield part, self._members[part].at(places[begin:end] - self._begin(part)), slice(begin, end)

    def _begin(self, part: int) -> int:
        return int(self._ends[part - 1]) if part else 0

    def _rank(self, part: int, index: int) -> int:
        """How many samples of the set come before ``index`` of ``part``."""
        return self._begin(part) + self._members[part].rank(index)


# ---- which samples of an order are in the set ------------------------------------------------------------------------------


class _Members(Protocol):
    """Ascending indices."""

    def __len__(self) -> int: ...

    def at(self, places: Numbers) -> Numbers:
        """The indices at ``places``."""

    def rank(self, index: int) -> int:
        """How many are below ``index``."""

    def run(self, place: int, most: int) -> tuple[int, int, int]:
        """(first, last + 1, how many) of a row of up to ``most`` of them from ``place`` on."""


class _Ranged:
    """All indices of ``ranges``."""

    def __init__(self, ranges: Ranges) -> None:
        self._ranges = list(ranges)
        self._before = np.cumsum([0] + [last - begin for begin, last in ranges])
        self._begins = np.array([begin for begin, _ in ranges], np.int64)

    def __len__(self) -> int:
        return int(self._before[-1])

    def at(self, places: Numbers) -> Numbers:
        k = np.searchsorted(self._before, places, side="right") - 1
        return self._begins[k] + places - self._before[k]

    def rank(self, index: int) -> int:
        return sum(max(0, min(last, index) - first) for first, last in self._ranges)

    def run(self, place: int, most: int) -> tuple[int, int, int]:
        k = bisect_right(self._before.tolist(), place) - 1
        begin = self._ranges[k][0] + place - int(self._before[k])
        count = min(most, self._ranges[k][1] - begin)
        return begin, begin + count, count


class _Listed:
    """The ``indices``, (n,) ascending."""

    def __init__(self, indices: np.ndarray) -> None:
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def at(self, places: Numbers) -> Numbers:
        return self._indices[places].astype(np.int64)

    def rank(self, index: int) -> int:
        return int(np.searchsorted(self._indices, index))

    def run(self, place: int, most: int) -> tuple[int, int, int]:
        count = min(most, len(self._indices) - place)
        return int(self._indices[place]), int(self._indices[place + count - 1]) + 1, count


def _members(originals: Sequence[Samples], seen: Sequence[Ranges]) -> list[_Members]:
    """For each of the ``originals`` those of its samples that share no token with one before them."""
    if len(originals) == 1 and (distinct := _distinct(originals[0], seen[0])) is not None:
        return [_Ranged(distinct)]
    grids = {samples.grid for samples in originals}
    on_one_grid = len(grids) == 1 and None not in grids

    def make() -> dict[str, np.ndarray]:
        found = _new_windows(originals, seen) if on_one_grid else _new_tokens(originals, seen)
        return {str(i): indices for i, indices in enumerate(found)}

    if sum(last - first for ranges in seen for first, last in ranges) < _CACHED:
        arrays = make()
    else:
        orders = [each.sample_order().model_dump(mode="json") for each in originals]
        read = [[list(each) for each in ranges] for ranges in seen]
        file = identity_of(originals[0].tokens.file).model_dump(exclude={"path"})
        arrays = cached({"version": 1, "what": "seen", "file": file, "orders": orders, "seen": read}, make)
    return [_Listed(arrays[str(i)]) for i in range(len(originals))]


def _distinct(samples: Samples, seen: Ranges) -> Ranges | None:
    """The set of ``seen`` samples of one order as ranges, where that can be said without looking at each; else None."""
    if isinstance(samples, NeoxSamples | MegatronSamples):
        return seen if samples.num_epochs == 1 else None
    size = samples.samples_per_epoch
    first, last = seen[0][0], seen[-1][1]
    if (last - 1) // size == first // size:
        return seen
    if first % size == 0 and seen[0][1] - first >= size:
        return [(first, first + size)]
    return None


def _blocks(ranges: Ranges, size: int) -> Iterator[Numbers]:
    for first, last in ranges:
        for begin in range(first, last, size):
            yield np.arange(begin, min(begin + size, last))


def _new_windows(originals: Sequence[Samples], seen: Sequence[Ranges]) -> list[np.ndarray]:
    most = max(each.samples_per_epoch for each in originals)  # padded rows may be more than windows
    taken = np.zeros(max(most, originals[0].tokens.num_tokens // originals[0].sequence_length) + 1, bool)
    found = []
    for samples, ranges in zip(originals, seen, strict=True):
        mine = [np.empty(0, np.int64)]
        for indices in _blocks(ranges, _BLOCK):
            numbers = samples.windows(indices)
            first = np.zeros(len(numbers), bool)
            first[np.unique(numbers, return_index=True)[1]] = True
            mine.append(indices[first & ~taken[numbers]])
            taken[numbers] = True
        found.append(np.concatenate(mine))
    return found


def _new_tokens(originals: Sequence[Samples], seen: Sequence[Ranges]) -> list[np.ndarray]:
    file = originals[0].tokens.file
    if any(each.is_packed for each in originals):
        raise UserError(
            f"replay of lineage: {file.path} was read packed (data.pack) and in another way, and which samples share tokens is "
            f"not known: give it as replay.sources"
        )
    begin = min(each.tokens.span[0] for each in originals)
    end = max(each.tokens.span[1] for each in originals)
    if end - begin > _MOST_TOKENS:
        raise UserError(
            f"replay of lineage: {file.path} was read in several orders or epochs, and which of its {end - begin:,} tokens "
            f"were read twice is only found for up to {_MOST_TOKENS:,}: give it as replay.sources"
        )
    taken = np.zeros(end - begin, bool)
    found = []
    for samples, ranges in zip(originals, seen, strict=True):
        mine: list[int] = []
        length = samples.sequence_length
        for indices in _blocks(ranges, 2**12):
            starts, lengths = samples.pieces(indices)
            after = np.cumsum(lengths)
            bounds = [0, *np.searchsorted(after, (length + 1) * np.arange(1, len(indices) + 1)) + 1]
            firsts, lasts = (starts - begin).tolist(), (starts - begin + lengths).tolist()
            for index, i, j in zip(indices.tolist(), bounds[:-1], bounds[1:], strict=True):
                # the last token of a sample is only a target: the next sample begins with it
                spans = [*zip(firsts[i : j - 1], lasts[i : j - 1], strict=True), (firsts[j - 1], lasts[j - 1] - 1)]
                if not any(taken[a:b].any() for a, b in spans):
                    mine.append(index)
                    for a, b in spans:
                        taken[a:b] = True
        found.append(np.array(mine, np.int64))
    return found


def view_of(order: SampleOrder, file: TokenFile) -> TokenView:
    """The documents of ``file`` that were read in ``order``. Raises ``UserError`` if its list or scores are gone or others."""
    if order.documents is None:
        view = file.view(order.first_document, order.last_document)
    else:
        view = listed(file, _table(order.documents, "list", file), order.documents)
    if order.scores is not None:
        table = _table(order.scores, "scores", file)
        view, _ = by_score(view, table, order.scores, descending=order.descending)
    return view


def _table(then: TableUsed, kind: TableKind, file: TokenFile) -> DocumentTable:
    """The table that was read then: where it was, or else beside ``file``, which may have moved."""
    places = [Path(then.path), file.path.parent / Path(then.path).name]
    place = next((place for place in places if place.is_file()), places[0])
    table = read_table(place, kind, file)
    if used(place, table) != then:
        raise UserError(f"{place} has changed since it was read: restore it, or give replay.sources instead of the lineage")
    return table


def reopen(order: SampleOrder, file: TokenFile) -> Samples:
    """The samples of a recorded ``order`` in its ``file``. Raises as ``view_of``."""
    view = view_of(order, file)
    if order.packed:
        return PackedSamples(view, order.sequence_length, order.key if order.kind == "permuted" else None, None)
    match order.kind:
        case "sequential":
            return SequentialSamples(view, order.sequence_length, None)
        case "permuted":
            return PermutedSamples(view, order.sequence_length, order.key, None)
        case "rows":
            return RowSamples(view, order.sequence_length, order.first_row, None)
        case "neox":
            return NeoxSamples(view, order.sequence_length, order.key, 1, epoch_ranges=order.epochs)
        case "megatron":
            return MegatronSamples(view, order.sequence_length, order.key, 1, epoch_ranges=order.epochs)


def union(ranges: Ranges) -> tuple[tuple[int, int], ...]:
    """The ranges as ascending ones that neither overlap nor touch."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if first >= last:
            continue
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return tuple(merged)
