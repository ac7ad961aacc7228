"""The layers of Llama (arXiv 2302.13971) and its relatives as plain PyTorch on one device: RMSNorm, grouped queries, SwiGLU.

What differs between the families is chosen where a layer is built. Parallelism is applied to it from outside.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from megarewarm_kernels import attention
from torch import Tensor, nn
from torch.nn import functional as F

from megarewarm.config.model import ModelConfig
from megarewarm.model.given_bias import waiting_bias
from megarewarm.model.positions import Positions


def layer(config: ModelConfig, number: int) -> LlamaLayer:
    """Layer ``number``, counted from 0."""
    return (NormBefore if config.norm_place == "before" else NormAfter)(config, number)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) x weight (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        return (exact * (exact.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight).to(x.dtype)


class LlamaLayer(nn.Module):
    """Attention and MLP, one after the other."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.layernorm_eps)
        self.attention = _ATTENTION[config.qk_norm](config, number)
        self.mlp_norm = RMSNorm(config.hidden_size, config.layernorm_eps)
        self.mlp = GatedMLP(config)


class NormBefore(LlamaLayer):
    """x += attention(norm(x)), x += mlp(norm(x))."""

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        x = x + self.attention(self.attention_norm(x), positions)
        return x + self.mlp(self.mlp_norm(x))


class NormAfter(LlamaLayer):
    """x += norm(attention(x)), x += norm(mlp(x)): OLMo 2 (arXiv 2501.00656, section 3.2)."""

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        x = x + self.attention_norm(self.attention(x, positions))
        return x + self.mlp_norm(self.mlp(x))


class GroupedAttention(nn.Module):
    """Causal attention with grouped queries (arXiv 2305.13245). ``query_key_value`` has, key head by key head, the rows of its
    queries, its key and its value. ``backend``, ``deterministic``: see megarewarm_kernels.attention.choose."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        self.head_dim, self.group = config.head_width, config.queries_per_key
        self.window = config.window_of(number)
        self.planes = 0 if number in config.unrotated_layers else config.rotary_dims // 2
        self.backend, self.deterministic = "auto", False
        queries, keys = (heads * self.head_dim for heads in (config.num_heads, config.kv_heads))
        self.query_key_value = nn.Linear(config.hidden_size, queries + 2 * keys, bias=config.attention_bias)
        self.dense = nn.Linear(queries, config.hidden_size, bias=config.attention_output_bias)

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """(b, s, h) to (b, s, h). The number of heads follows from the width of the projection."""
        qkv = self.query_key_value(x.flatten(0, 1)).view(*x.shape[:2], -1)
        context = attention(
            self.normed(qkv),
            positions.cos[..., : self.planes],
            positions.sin[..., : self.planes],
            head_dim=self.head_dim,
            group=self.group,
            window=self.window,
            starts=positions.starts,
            bias=waiting_bias(self.query_key_value),
            backend=self.backend,
            deterministic=self.deterministic,
        )
        return self.dense(context)

    def normed(self, qkv: Tensor) -> Tensor:
        """(b, s, k x (group + 2) x d), before positions are rotated."""
        return qkv

    def _apart(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Queries (b, s, k, group, d), keys and values (b, s, k, 1, d)."""
        return qkv.view(*qkv.shape[:2], -1, self.group + 2, self.head_dim).split([self.group, 1, 1], 3)


class HeadNormedAttention(GroupedAttention):
    """Each query and each key normed over its channels: Qwen 3 (arXiv 2505.09388)."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__(config, number)
        self.query_norm = RMSNorm(config.head_width, config.layernorm_eps)
        self.key_norm = RMSNorm(config.head_width, config.layernorm_eps)

    def normed(self, qkv: Tensor) -> Tensor:
        queries, keys, values = self._apart(qkv)
        return torch.cat([self.query_norm(queries), self.key_norm(keys), values], 3).flatten(2)


class WidthNormedAttention(GroupedAttention):
    """All queries of a token normed together, and all its keys: OLMo 2 (arXiv 2501.00656)."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__(config, number)
        self.query_norm = RMSNorm(config.num_heads * config.head_width, config.layernorm_eps)
        self.key_norm = RMSNorm(config.kv_heads * config.head_width, config.layernorm_eps)

    def normed(self, qkv: Tensor) -> Tensor:
        queries, keys, values = self._apart(qkv)
        normed = self.query_norm(queries.flatten(2)).view(queries.shape), self.key_norm(keys.flatten(2)).view(keys.shape)
        return torch.cat([*normed, values], 3).flatten(2)


_ATTENTION = {"none": GroupedAttention, "head": HeadNormedAttention, "width": WidthNormedAttention}


class GatedMLP(nn.Module):
    """down(silu(gate(x)) x up(x)) (arXiv 2002.05202). ``gate_up`` has the rows of gate and up in turn."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.mlp_size, bias=config.mlp_bias)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(self.expand(x))

    def expand(self, x: Tensor) -> Tensor:
        """(..., h) to (..., 2 f), gate and up in turn."""
        return self.gate_up(x)

    def contract(self, x: Tensor) -> Tensor:
        """(..., 2 f) to (..., h): the product and what follows."""
        gate, up = x.unflatten(-1, (-1, 2)).unbind(-1)
        return self.down(F.silu(gate) * up)


class DeferredSum(NamedTuple):
    """A residual stream to which the last sublayer's result has yet to be added (fused.py)."""

    x: Tensor
    out: Tensor
