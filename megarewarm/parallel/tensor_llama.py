"""The sublayers of Llama-like layers on several tensor-parallel ranks: whole groups of queries, and some columns of the MLP.

Norms stay with the residual stream, before a sublayer's entrance or after its exit: with sequence parallelism they see
s / T positions, without it each rank computes them whole.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from megarewarm.model.llama import LlamaLayer, RMSNorm, WidthNormedAttention
from megarewarm.parallel.tensor_ranks import RowLinear, TensorRanks


def shard_layer(layer: LlamaLayer, ranks: TensorRanks) -> None:
    """Make both sublayers of ``layer`` ones that compute this rank's share and meet the other ranks."""
    for sublayer, last in ((layer.attention, layer.attention.dense), (layer.mlp, layer.mlp.down)):
        last.__class__ = RowLinear
        _meet_others(sublayer, last, ranks)
    if isinstance(layer.attention, WidthNormedAttention):
        for norm in (layer.attention.query_norm, layer.attention.key_norm):
            norm.__class__ = WidthNorm
            norm.ranks = ranks  # type: ignore[assignment]


def _meet_others(sublayer: nn.Module, last: nn.Linear, ranks: TensorRanks) -> None:
    """From the residual stream and back to it. The bias of the ``last`` linear layer is added after the sum."""
    share = sublayer.forward

    def forward(x: Tensor, *rest: Any) -> Tensor:
        out = ranks.leave(share(ranks.enter(x), *rest))
        return out if last.bias is None else out + last.bias

    sublayer.forward = forward


class WidthNorm(RMSNorm):
    """The norm of a width of which each rank has a part."""

    ranks: TensorRanks

    def forward(self, x: Tensor) -> Tensor:
        squares = x.float().square().sum(-1, keepdim=True) / (x.shape[-1] * self.ranks.size)
        scale = (self.ranks.sum_for_all(squares) + self.eps).rsqrt()
        return (x * scale * self.weight).to(x.dtype)
