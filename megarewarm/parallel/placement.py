"""The placement of parameters: the part of each that a rank holds, and the whole that the parts make.

Names and shapes are those of the model on one device, and a parameter's card states the dimension that tensor ranks share.
All code that cuts, gathers, counts or saves a tensor uses it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megarewarm.model.parameters import Card


@dataclass(frozen=True)
class TensorSlice:
    """A rank's part of a tensor of ``shape``: ``local``, which begins at ``offsets`` of the whole. It may be empty.
    Explicit, not a DTensor: DTensors follow torch's own rule of dividing only, and sharded padded rows follow another."""

    local: Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    def of(self, whole: Tensor) -> Tensor:
        """A view of the same part of ``whole``."""
        sizes = self.local.shape
        return whole[tuple(slice(first, first + size) for first, size in zip(self.offsets, sizes, strict=True))]


@dataclass(frozen=True)
class Placement:
    """A parameter of global ``shape``, divided along ``dim`` over ``ranks`` tensor-parallel ranks (None: whole on each).
    ``partial``: the gradient on each rank is a part of a sum over the tensor-parallel ranks."""

    name: str
    shape: tuple[int, ...]
    dim: int | None
    rank: int
    ranks: int
    partial: bool

    @property
    def per_rank(self) -> int:
        """Rows (or columns) that a rank allocates; the last ones of the last rank may be padding."""
        assert self.dim is not None
        return -(-self.shape[self.dim] // self.ranks)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's allocation."""
        if self.dim is None:
            return self.shape
        return (*self.shape[: self.dim], self.per_rank, *self.shape[self.dim + 1 :])

    def slice(self, local: Tensor, shard: int = 0, shards: int = 1) -> TensorSlice:
        """What ``local`` holds of the whole, without padding. It is what this rank allocated or, of ``shards``, the one with
        number ``shard``, which fully_shard cuts off along the first dimension."""
        offsets = [0] * len(self.shape)
        if self.dim is not None:
            offsets[self.dim] = self.rank * self.per_rank
        if shards > 1:
            rows = -(-self.local_shape[0] // shards)
            before = min(shard * rows, self.local_shape[0])
            assert local.shape[0] == min(rows, self.local_shape[0] - before), f"{self.name}: fully_shard divides otherwise"
            offsets[0] += before
        offsets = [min(first, end) for first, end in zip(offsets, self.shape, strict=True)]
        sizes = [min(n, end - first) for n, end, first in zip(local.shape, self.shape, offsets, strict=True)]
        return TensorSlice(local[tuple(slice(0, size) for size in sizes)], tuple(offsets), self.shape)

    def fill(self, local: Tensor, whole: Tensor, shard: int = 0, shards: int = 1) -> None:
        """Copy the part of ``whole`` that ``local`` (see ``slice``) holds into it; padding becomes zero."""
        with torch.no_grad():
            mine = self.slice(local, shard, shards)
            if mine.local.numel() < local.numel():
                local.zero_()
            mine.local.copy_(mine.of(whole))


def place(card: Card, rank: int, ranks: int, sequence: bool) -> Placement:
    """The placement of a parameter. ``sequence``: with sequence parallelism.

    Partial are the parameters used on a part of the work only: those that feed this rank's heads and MLP columns, and with
    sequence parallelism all that are whole on each rank, which see this rank's positions only.
    """
    dim = card.divided if ranks > 1 else None
    partial = ranks > 1 and dim is None and (sequence or card.feeds_share)
    return Placement(card.name, card.shape, dim, rank, ranks, partial)
