"""Tensor parallelism (arXiv 1909.08053), applied to a NeoX from outside: its parts are replaced by ones that hold a share.

Heads, MLP columns and vocabulary rows are divided. A layer with the parallel residual communicates twice per step: forward,
when the two partial results are summed together, and backward, at its input. With sequence parallelism (arXiv 2205.05198)
the residual stream and the norms' statistics have s / T positions, and the sum becomes a reduce-scatter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megarewarm.config.schema import ModelConfig
from megarewarm.errors import UserError
from megarewarm.model.neox import Layer, NeoX, Positions
from megarewarm.model.parameters import cards
from megarewarm.parallel.collectives import (
    Group,
    copy_to_group,
    gather_sequence,
    scatter_sequence_sum,
    sum_over_group,
)
from megarewarm.parallel.placement import place


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


def check(config: ModelConfig, sequence_length: int, ranks: int, sequence: bool) -> None:
    """Raise ``UserError`` naming the number to change if ``ranks`` can't share the model."""
    for key, value in (("num_heads", config.num_heads), ("ffn_size", config.mlp_size)):
        if value % ranks:
            raise UserError(
                f"parallel.tensor: {ranks} ranks can't share model.{key} {value} evenly; choose a divisor of {value}"
            )
    if ranks > config.vocab_size:
        raise UserError(f"parallel.tensor: {ranks} ranks for a vocabulary of {config.vocab_size}; choose fewer")
    if sequence and sequence_length % ranks:
        raise UserError(
            f"parallel.sequence: {ranks} tensor ranks can't share data.sequence_length {sequence_length} evenly; choose a "
            f"divisor of {sequence_length} for parallel.tensor or set parallel.sequence to false"
        )


def shard(model: NeoX, ranks: TensorRanks) -> None:
    """Replace the parts of ``model`` (on the meta device) by their shares. Parameter names stay, padded rows are added."""
    model.embed_in = ShardedEmbedding(model.embed_in, ranks)  # type: ignore[assignment]
    model.layers = nn.ModuleList(ShardedLayer(layer, ranks) for layer in model.layers)  # type: ignore[arg-type]
    every = cards(model.config)
    for module_name, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            full = f"{module_name}.{name}".removeprefix(".")
            placement = place(every[full], ranks.rank, ranks.size, ranks.sequence)
            setattr(module, name, nn.Parameter(parameter.new_empty(placement.local_shape)))


class ShardedEmbedding(nn.Module):
    """Rows of the vocabulary: ids of other ranks give zero, so the sum over ranks is each id's row."""

    def __init__(self, embedding: nn.Embedding, ranks: TensorRanks) -> None:
        super().__init__()
        self.weight = embedding.weight
        self.ranks = ranks

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.weight.shape[0]
        local = tokens - self.ranks.rank * rows
        elsewhere = (local < 0) | (local >= rows)
        found = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.ranks.leave(found.masked_fill(elsewhere[..., None], 0))


class RowLinear(nn.Linear):
    """A linear layer over this rank's columns. Its bias is added after the all-reduce."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


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
        scaled = lambda x: F.linear(torch.addcmul(norm.bias, x, norm.weight), self.weight, self.bias)  # noqa: E731
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
