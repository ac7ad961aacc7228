"""Rows of s + 1 ids at any position of a blend of sources."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megarewarm.data.files.file_identity import FileIdentity, identity_of
from megarewarm.data.mixture.blend import AnyBlend
from megarewarm.data.order.row_places import RowPlace, runs_of
from megarewarm.data.order.samples import Samples
from megarewarm.errors import UserError
from megarewarm.packed_rows import plain


class BlendedRows:
    """Rows out of several sources: ``blend`` says of which source, and which sample of it, each position is. ``names`` and
    ``samples`` have one entry per source. Rows are checked against ``vocab_size`` when they are read."""

    def __init__(self, names: Sequence[str], samples: Sequence[Samples], blend: AnyBlend, vocab_size: int) -> None:
        self.names = list(names)
        self.samples = list(samples)
        self.sequence_length = samples[0].sequence_length
        self._blend = blend
        self._vocab_size = vocab_size

    def files(self) -> list[FileIdentity]:
        """What identifies each source's tokens."""
        return [identity_of(samples.tokens.file) for samples in self.samples]

    def counts(self, positions: int) -> npt.NDArray[np.int64]:
        """How many of the first ``positions`` rows each source gives, (sources,): its samples 0 up to that number."""
        return self._blend.counts(positions)

    def read(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Rows of the positions [first, first + count), (count, s + 1) int64. ``UserError`` for an id out of range."""
        source, index = self._blend.locate(np.arange(first, first + count))
        rows = np.empty((count, self.sequence_length + 1), np.int64)
        for i in np.unique(source).tolist():
            (places,) = np.nonzero(source == i)
            part = np.empty((len(places), self.sequence_length + 1), np.int64)
            self.samples[i].fill(index[places], part)
            self._check(i, index[places], part)
            rows[places] = part
        return rows

    def places(self, first: int, count: int) -> list[RowPlace]:
        """Where the rows of the positions [first, first + count) lie."""
        sources, indices = self._blend.locate(np.arange(first, first + count))
        found = []
        for row, (i, index) in enumerate(zip(sources.tolist(), indices.tolist(), strict=True)):
            starts, lengths = self.samples[i].pieces(np.array([index]))
            file = self.samples[i].tokens.file
            found.append(RowPlace(row, first + row, self.names[i], str(file.path), index, runs_of(file, starts, lengths)))
        return found

    def _check(self, source: int, index: npt.NDArray[np.int64], part: npt.NDArray[np.int64]) -> None:
        if self.samples[source].is_packed:
            part = plain(part)
        if int(part.max()) >= self._vocab_size or int(part.min()) < 0:
            row, column = np.argwhere((part >= self._vocab_size) | (part < 0))[0]
            raise UserError(
                f"{self.samples[source].tokens.file.path}: sample {index[row]} of source '{self.names[source]}' holds "
                f"id {part[row, column]}, outside of the model's vocabulary of {self._vocab_size} ids: the file was "
                f"made with another tokenizer, or is damaged"
            )
