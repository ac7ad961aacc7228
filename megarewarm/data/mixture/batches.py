"""Training batches: rows of s + 1 ids at any position of the run, the same for every number of data-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megarewarm.data.files.library import TokenFiles
from megarewarm.data.mixture.mixture import Mixture, build_mixture
from megarewarm.data.mixture.phases import Phase
from megarewarm.data.order.row_places import RowPlace
from megarewarm.data.order.sample_order import SamplesRead
from megarewarm.errors import UserError


class TrainingBatches:
    """The samples of a run, ``total_samples`` of them, any of which is read without reading those before it. ``files``: what
    each source's file holds; ``notes``: for the user."""

    def __init__(self, mixture: Mixture, total_samples: int) -> None:
        self._mixture, self._rows = mixture, mixture.rows
        self.total_samples = total_samples
        self.sequence_length = self._rows.sequence_length
        self.names = self._rows.names
        self.files = self._rows.files()
        self.notes = mixture.notes

    def rows(self, first_sample: int, count: int) -> npt.NDArray[np.int64]:
        """Samples [first_sample, first_sample + count), (count, s + 1) int64. ``UserError`` past the run's end."""
        self._check_range(first_sample, count)
        return self._rows.read(first_sample, count)

    def share(self, first_sample: int, global_batch: int, rank: int, world: int) -> npt.NDArray[np.int64]:
        """A rank's rows [rank B/W, (rank + 1) B/W) of the global batch of B that starts at ``first_sample``. (B/W, s + 1)
        int64; the ranks' shares in their order are ``rows(first_sample, B)``, whatever their number."""
        if global_batch % world or not 0 <= rank < world:
            raise ValueError(f"no share of rank {rank} of {world} in a global batch of {global_batch} sequences")
        self._check_range(first_sample, global_batch)
        size = global_batch // world
        return self._rows.read(first_sample + rank * size, size)

    def places(self, first_sample: int, count: int) -> list[RowPlace]:
        """Of each sample of [first_sample, first_sample + count): its file, and the documents that it consists of."""
        self._check_range(first_sample, count)
        return self._rows.places(first_sample, count)

    def tokens_per_source(self, first_sample: int, count: int) -> dict[str, int]:
        """Training tokens (s per sample) that each source gives to the samples [first_sample, first_sample + count)."""
        self._check_range(first_sample, count)
        counts = self._rows.counts(first_sample + count) - self._rows.counts(first_sample)
        return dict(zip(self.names, (counts * self.sequence_length).tolist(), strict=True))

    def samples_read(self, ranges: Sequence[tuple[int, int]]) -> list[tuple[SamplesRead, int]]:
        """Of each source, which of its samples are in the ``ranges`` [first, last) of positions, and how many."""
        for first, last in ranges:
            self._check_range(first, last - first)
        bounds = [(self._rows.counts(first), self._rows.counts(last)) for first, last in ranges]
        found = []
        for i, samples in enumerate(self._rows.samples):
            mine = [(int(first[i]), int(last[i])) for first, last in bounds if first[i] < last[i]]
            reads = [samples.read_between(first, last) for first, last in mine] or [samples.read_between(0, 0)]
            last_order = reads[-1].order
            joined: list[tuple[int, int]] = []
            for first, last in (each for read in reads if read.order == last_order for each in read.ranges):
                if joined and joined[-1][1] == first:
                    first = joined.pop()[0]
                joined.append((first, last))
            read = reads[-1].model_copy(update={"ranges": tuple(joined)})
            found.append((read, sum(last - first for first, last in mine)))
        return found

    def fingerprint(self, before: int | None = None) -> str:
        """32 hex digits of everything that determines the tokens at each position: files, splits, weights, order, seed.

        Of the positions [0, ``before``) (None: all): later switches of the blend have no part in it. In the ``permuted``
        order it doesn't depend on the length of the run; in the others on their number of epochs.
        """
        return self._mixture.fingerprint(self.total_samples if before is None else before)

    def _check_range(self, first: int, count: int) -> None:
        if first < 0 or count < 0 or first + count > self.total_samples:
            raise UserError(
                f"samples {first} to {first + count} were asked for, the run's data end at {self.total_samples}: raise "
                f"training.budget, or set start.data to 'restart'"
            )


def build_training_batches(files: TokenFiles, phases: Sequence[Phase], *, total_samples: int) -> TrainingBatches:
    """``total_samples`` samples (steps x global batch) of the ``phases``, as ``build_mixture`` orders them."""
    return TrainingBatches(build_mixture(files, phases, total_samples=total_samples), total_samples)
