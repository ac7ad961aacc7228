"""Validation windows: the same token slices at every evaluation, in every run, for every number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from megarewarm.config.data import ValidationSet
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.mixture.blend import Blend
from megarewarm.data.mixture.blended_rows import BlendedRows
from megarewarm.data.mixture.mixture import source_names
from megarewarm.data.order.permutation import derive_key
from megarewarm.data.order.samples import PermutedSamples
from megarewarm.errors import UserError

SEED = 20240313  # of the choice of windows: fixed, so that runs with different data.seed see the same tokens


class Slice:
    """The windows [first, first + count) of a set: what one evaluation reads."""

    def __init__(self, rows: BlendedRows, first: int, count: int) -> None:
        self._rows, self._first, self._count = rows, first, count

    def share(self, rank: int, world: int) -> range:
        """The windows of a rank. All ranks' shares together are each window once; they differ by at most one window."""
        if not 0 <= rank < world:
            raise ValueError(f"no share of rank {rank} of {world}")
        first, count = self._first, self._count
        return range(first + rank * count // world, first + (rank + 1) * count // world)

    def counts(self) -> npt.NDArray[np.int64]:
        """How many of the windows each source gives, (sources,)."""
        return self._rows.counts(self._first + self._count) - self._rows.counts(self._first)

    def micro_batches(self, rank: int, world: int, micro_batch: int) -> Iterator[npt.NDArray[np.int64]]:
        """A rank's windows as rows (b, s + 1) int64, b up to ``micro_batch``; only the last may be smaller."""
        mine = self.share(rank, world)
        for first in range(mine.start, mine.stop, micro_batch):
            yield self._rows.read(first, min(micro_batch, mine.stop - first))


class WindowSet:
    """A validation set, of which each evaluation reads ``num_windows`` windows, ``num_tokens`` tokens whose loss it
    measures. ``files``: what each source's file holds; ``notes``: what a user must know of the set; ``is_fixed``: whether all
    evaluations read the same windows."""

    is_fixed = True

    def __init__(self, config: ValidationSet, rows: BlendedRows, num_windows: int) -> None:
        self.name, self.role, self.when = config.name, config.role, config.when
        self.num_windows, self.num_tokens = num_windows, num_windows * rows.sequence_length
        self.files = rows.files()
        self.notes: list[str] = []
        self._rows = rows

    def slice(self, number: int) -> Slice:
        """What evaluation ``number`` reads, counted from 0: the same each time."""
        return Slice(self._rows, 0, self.num_windows)

    def portion(self, number: int, count: int) -> Slice:
        """Portion ``number``, from 0, of ``count`` windows each, or of all if there are fewer; after the last whole portion the
        first comes again."""
        count = min(count, self.num_windows)
        return Slice(self._rows, number % (self.num_windows // count) * count, count)


class ValidationWindows(WindowSet):
    """The first floor(tokens / s) windows of the permuted order of the set's sources, blended by weight.

    At most as many as the sources hold in one epoch (or in ``max_epochs``, where that is less), which ``notes`` say.
    Neither ``data.order`` (but for the rounding of splits) nor ``data.seed`` changes them. Raises ``UserError`` where
    not one whole window is left, and for files that can't be read.
    """

    def __init__(self, config: ValidationSet, files: TokenFiles) -> None:
        data = files.data
        views = [files.view(source) for source in config.sources]
        samples = [
            PermutedSamples(view, data.sequence_length, derive_key(SEED, i), min(source.max_epochs or 1.0, 1.0))
            for i, (view, source) in enumerate(zip(views, config.sources, strict=True))
        ]
        blend = Blend([source.weight for source in config.sources])
        rows = BlendedRows(source_names(config.sources), samples, blend, files.vocab_size)
        wanted = config.tokens // data.sequence_length
        super().__init__(config, rows, _most(blend, [part.num_samples or 0 for part in samples], wanted))
        if self.num_windows < 1:
            raise UserError(
                f"validation set '{config.name}' comes to no whole window of {data.sequence_length} tokens: raise its "
                f"'tokens' ({config.tokens}) or give it longer sources"
            )
        if self.num_windows < wanted:
            self.notes.append(
                f"validation set '{self.name}' is evaluated on {self.num_tokens:,} tokens, not on the {config.tokens:,} asked "
                f"for: its sources hold no more{self._why(config, samples)}"
            )

    def _why(self, config: ValidationSet, samples: list[PermutedSamples]) -> str:
        """Of several sources, which one ends first."""
        if len(samples) == 1:
            return ""
        counts = self._rows.counts(self.num_windows + 1)
        names = source_names(config.sources)
        over = [name for name, part, n in zip(names, samples, counts, strict=True) if n > (part.num_samples or 0)]
        return f" in these shares, '{over[0]}' is used up first" if over else ""


def _most(blend: Blend, limits: list[int], wanted: int) -> int:
    """The largest n of up to ``wanted`` whose first n picks of the blend ask no source for more than its limit."""
    low, high = 0, min(wanted, sum(limits))
    while low < high:
        middle = math.ceil((low + high) / 2)
        if (blend.counts(middle) <= np.array(limits)).all():
            low = middle
        else:
            high = middle - 1
    return low
