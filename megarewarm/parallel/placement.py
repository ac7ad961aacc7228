"""Where each parameter lies: which part of it a rank holds, and the whole that the parts make.

Names and shapes are those of the model on one device. The rules are one table; everything that cuts a tensor, puts one
together, counts one or saves one asks it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megarewarm.config.schema import ModelConfig

# What each parameter's name ends with -> the dimension that tensor parallelism divides.
_DIVIDED = {
    "query_key_value.weight": 0,
    "query_key_value.bias": 0,
    "dense_h_to_4h.weight": 0,
    "dense_h_to_4h.bias": 0,
    "attention.dense.weight": 1,
    "mlp.dense_4h_to_h.weight": 1,
    "embed_in.weight": 0,
    "embed_out.weight": 0,
}
_VOCABULARY = ("embed_in.weight", "embed_out.weight")


@dataclass(frozen=True)
class Placement:
    """A parameter of global ``shape``, divided along ``dim`` over ``ranks`` tensor-parallel ranks (None: whole on each).

    ``partial``: the gradient on each rank is a part of a sum over the tensor-parallel ranks.
    """

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
        """Shape of what this rank allocates."""
        if self.dim is None:
            return self.shape
        return (*self.shape[: self.dim], self.per_rank, *self.shape[self.dim + 1 :])

    @property
    def valid(self) -> int:
        """How many of a rank's rows (or columns) are the parameter's own and not padding."""
        assert self.dim is not None
        return max(0, min(self.per_rank, self.shape[self.dim] - self.rank * self.per_rank))

    def mine(self, whole: Tensor) -> Tensor:
        """A view of this rank's part of the whole parameter, without padding."""
        if self.dim is None:
            return whole
        return whole.narrow(self.dim, min(self.rank * self.per_rank, self.shape[self.dim]), self.valid)

    def unpadded(self, local: Tensor) -> Tensor:
        """A view of what this rank allocated, without padding."""
        return local if self.dim is None else local.narrow(self.dim, 0, self.valid)

    def fill(self, local: Tensor, whole: Tensor) -> None:
        """Copy this rank's part of ``whole`` into ``local``; padding becomes zero."""
        with torch.no_grad():
            if self.dim is not None and self.valid < self.per_rank:
                local.zero_()
            self.unpadded(local).copy_(self.mine(whole))


def place(name: str, shape: tuple[int, ...], config: ModelConfig, rank: int, ranks: int, sequence: bool) -> Placement:
    """The placement of parameter ``name``. ``sequence``: with sequence parallelism.

    Partial are the parameters used on a part of the work only. The layers' norms feed this rank's heads and MLP columns;
    with sequence parallelism the biases that are added after the sum and the last norm see this rank's positions only.
    """
    dim = next((dim for ending, dim in _DIVIDED.items() if name.endswith(ending)), None) if ranks > 1 else None
    if name in _VOCABULARY:
        shape = (config.vocab_size, *shape[1:])
    partial = ranks > 1 and dim is None and (sequence or "layernorm" in name)
    return Placement(name, tuple(shape), dim, rank, ranks, partial)
