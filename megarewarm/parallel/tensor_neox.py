"""A layer of GPT-NeoX on several tensor-parallel ranks: some heads and some columns of the MLP on each.

With the parallel residual it communicates twice per step: forward, when the two partial results are summed together, and
backward, at its input. With sequence parallelism the norms' statistics too have s / T positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megarewarm.model.low_weights import product
from megarewarm.model.neox import Layer
from megarewarm.model.positions import Positions
from megarewarm.parallel.tensor_ranks import RowLinear, TensorRanks


class AffineLinear(nn.Linear):
    """A linear layer that begins with a norm's scale and shift. It keeps its input, which both of a layer's norms share, and
    recomputes the scaled tensor for the backward pass; the product itself is not repeated."""

    @classmethod
    def adopt(cls, linear: nn.Linear, norm: nn.LayerNorm) -> None:
        """Make ``linear`` one of these."""
        linear.__class__ = cls
        linear.norm_of = (norm,)  # type: ignore[assignment]  # in a tuple: the norm is not a part of this module

    def forward(self, x: Tensor) -> Tensor:
        (norm,) = self.norm_of  # type: ignore[misc]
        assert isinstance(norm, nn.LayerNorm)
        scaled = lambda x: product(self, torch.addcmul(norm.bias, x, norm.weight), self.bias)  # noqa: E731
        return checkpoint(scaled, x, use_reentrant=False)


class ShardedLayer(nn.Module):
    """A layer of which this rank computes some heads and some columns of the MLP."""

    def __init__(self, layer: Layer, ranks: TensorRanks) -> None:
        super().__init__()
        self.parallel = layer.parallel
        self.ranks = ranks
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.attention = layer.attention
        self.mlp = layer.mlp
        self.attention.dense.__class__ = RowLinear
        self.mlp.dense_4h_to_h.__class__ = RowLinear
        if ranks.sequence:
            AffineLinear.adopt(self.attention.query_key_value, self.input_layernorm)
            AffineLinear.adopt(self.mlp.dense_h_to_4h, self.post_attention_layernorm)

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        if self.parallel:
            whole = self._enter(x)
            attn_out = self.attention(self._normed(whole, self.input_layernorm), positions)
            partial = attn_out + self.mlp(self._normed(whole, self.post_attention_layernorm))
            return x + self._add_biases(self.ranks.leave(partial), self.attention.dense.bias, self.mlp.dense_4h_to_h.bias)
        attn_out = self.attention(self._normed(self._enter(x), self.input_layernorm), positions)
        x = x + self._add_biases(self.ranks.leave(attn_out), self.attention.dense.bias)
        out = self.mlp(self._normed(self._enter(x), self.post_attention_layernorm))
        return x + self._add_biases(self.ranks.leave(out), self.mlp.dense_4h_to_h.bias)

    def _enter(self, x: Tensor) -> Tensor:
        """With sequence parallelism both norms' common part, (x - mean) / deviation, is computed before the gathering."""
        if self.ranks.sequence:
            norm = self.input_layernorm
            x = F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
        return self.ranks.enter(x)

    def _normed(self, whole: Tensor, norm: nn.LayerNorm) -> Tensor:
        return whole if self.ranks.sequence else norm(whole)

    @staticmethod
    def _add_biases(x: Tensor, *biases: Tensor | None) -> Tensor:
        present = [bias for bias in biases if bias is not None]
        return x + sum(present[1:], present[0]) if present else x
