"""What a rank has of a tensor-parallel layer, and how it meets the others (arXiv 1909.08053).

With sequence parallelism (arXiv 2205.05198) the residual stream has s / T positions, and the sum becomes a reduce-scatter.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from megarewarm.model.low_weights import product
from megarewarm.parallel.collectives import (
    Group,
    copy_to_group,
    gather_sequence,
    scatter_sequence_sum,
    sum_over_group,
)


@dataclass(frozen=True)
class TensorRanks:
    """The ranks that hold one replica's layers together. ``sequence``: they share the sequence between the layers."""

    group: Group
    sequence: bool

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()

    def enter(self, x: Tensor) -> Tensor:
        """From the residual stream to the input of every rank: the whole sequence."""
        return gather_sequence(x, self.group) if self.sequence else copy_to_group(x, self.group)

    def leave(self, partial: Tensor) -> Tensor:
        """From the ranks' partial results to the residual stream."""
        return scatter_sequence_sum(partial, self.group) if self.sequence else sum_over_group(partial, self.group)

    def sum_for_all(self, partial: Tensor) -> Tensor:
        """The sum of the ranks' partial results, which each rank uses for its part of the result."""
        return copy_to_group(sum_over_group(partial, self.group), self.group)


class RowLinear(nn.Linear):
    """A linear layer over this rank's columns. Its bias is added after the all-reduce."""

    def forward(self, x: Tensor) -> Tensor:
        return product(self, x)
