"""Losses of an evaluation by the position of their input in the window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class PositionSums:
    """Losses and tokens of the positions [edges[i], edges[i + 1]), portion by portion."""

    def __init__(self, edges: Sequence[int]) -> None:
        self._edges = edges
        self._portions: list[Tensor] = []

    def add(
        self, hidden: Tensor, targets: Tensor, sum_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Take a portion in: hidden states (b, s, h), targets (b, s), of which ``sum_of`` gives (loss summed, tokens). Returns
        those of the whole portion, fp64 scalars."""
        parts = [
            torch.stack([each.double() for each in sum_of(hidden[:, first:last], targets[:, first:last])])
            for first, last in pairwise(self._edges)
        ]
        self._portions.append(torch.stack(parts).cpu())
        loss, count = torch.stack(parts).sum(0)
        return loss, count

    def forget(self) -> None:
        """Leave the last portion out."""
        self._portions.pop()

    def total(self) -> npt.NDArray[np.float64]:
        """(edges - 1, 2): losses summed, and tokens, of all portions."""
        return sum(self._portions, torch.zeros(len(self._edges) - 1, 2, dtype=torch.float64)).numpy()
