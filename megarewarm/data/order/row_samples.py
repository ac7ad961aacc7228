"""Finished samples: a file whose rows of s + 1 tokens are read one after another, as Pythia's published data order is stored.

EleutherAI's "preshuffled" Pile (of Pythia, arXiv 2304.01373) is GPT-NeoX's order written out: row i of 2049 tokens is the i-th
sample that the models saw, 1024 of them at each step.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import numpy as np
import numpy.typing as npt

from megarewarm.data.files.token_file import TokenView
from megarewarm.data.order.sample_order import SampleOrder
from megarewarm.data.order.samples import Samples
from megarewarm.errors import UserError


class RowSamples(Samples):
    """Sample i is row ``first_row`` + i of the view, which must consist of whole rows of s + 1 tokens.

    ``samples_per_epoch`` counts the rows from ``first_row`` on; ``max_epochs`` limits how often they are gone through, in the
    same order each time (None: without end). Raises ``UserError`` for a view that is not a whole number of rows, or has none
    from ``first_row`` on.
    """

    def __init__(self, tokens: TokenView, sequence_length: int, first_row: int = 0, max_epochs: float | None = 1.0) -> None:
        super().__init__(tokens, sequence_length)
        rows, rest = divmod(tokens.num_tokens, sequence_length + 1)
        if rest:
            raise UserError(
                f"{tokens.file.path} has {tokens.num_tokens} tokens, no whole number of rows of {sequence_length + 1}: its "
                f"rows have another length (set data.sequence_length to theirs less 1), or it is not whole"
            )
        if first_row >= rows:
            raise UserError(f"{tokens.file.path} has {rows} rows, 'first_row' is {first_row}: the rows are counted from 0")
        self.order = f"rows from {first_row}"
        self.samples_per_epoch = rows - first_row
        self.num_samples = None if max_epochs is None else math.floor(max_epochs * self.samples_per_epoch)
        self._first_row = first_row

    def sample_order(self) -> SampleOrder:
        return self._sample_order("rows", first_row=self._first_row)

    def pieces(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        length = self.sequence_length + 1
        return self.tokens.runs(self.windows(indices) * length, length)

    @property
    def grid(self) -> Hashable:
        return "rows", self.tokens.span, self.sequence_length

    def windows(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return self._first_row + indices % self.samples_per_epoch
