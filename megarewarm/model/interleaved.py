"""Several matrices in one, their rows in turn, so that a cut between two turns has its share of each, as tensor ranks need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Interleaved:
    """In each turn ``counts[i]`` x ``unit`` rows of matrix i. Queries, keys and values: (group, 1, 1) heads of d rows; gate and
    up: (1, 1) single rows."""

    counts: tuple[int, ...]
    unit: int

    @property
    def turn(self) -> int:
        """Rows of a turn."""
        return sum(self.counts) * self.unit

    def rows(self, whole: int) -> tuple[int, ...]:
        """Of each matrix, where there are ``whole`` rows of all."""
        return tuple(whole // self.turn * count * self.unit for count in self.counts)

    def split(self, whole: Tensor) -> list[Tensor]:
        """The matrices (or vectors, of biases) in ``whole``, each (rows, ...)."""
        turns = whole.view(-1, self.turn, *whole.shape[1:])
        return [part.flatten(0, 1) for part in turns.split([count * self.unit for count in self.counts], 1)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of ``split``."""
        turns = [part.view(-1, count * self.unit, *part.shape[1:]) for part, count in zip(parts, self.counts, strict=True)]
        return torch.cat(turns, 1).flatten(0, 1)
