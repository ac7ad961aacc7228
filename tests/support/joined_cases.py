"""What the tests of the joined gradients share: three gradients at random, and the true gradient of the projection."""

from __future__ import annotations

import torch
from megarewarm_kernels.attention import rotary
from torch import Tensor

Joined = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int]
"""(queries (b, s, n, d), keys and values (b, s, k, d), cos, sin, bias, group): the operator's arguments."""


def joined(
    batch: int, length: int, heads: int, group: int, head_dim: int, half: int, dtype: torch.dtype, *, each: bool = False
) -> Joined:
    """Random; values lie head by head, as some implementations of attention write them. ``heads``: of keys. ``each``: angles of
    every token. The bias is fp32 (fp64 for fp64)."""
    random = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    queries, keys = normal(batch, length, heads * group, head_dim), normal(batch, length, heads, head_dim)
    values = normal(batch, heads, length, head_dim).transpose(1, 2)
    angles = normal(batch * length if each else length, half)
    parts = [part.to(dtype) for part in (queries, keys, values)]
    tables = [table.float().to(wide) for table in (angles.cos(), angles.sin())]  # numbers that fp32 holds
    return parts[0], parts[1], parts[2], tables[0], tables[1], torch.zeros(heads * (group + 2) * head_dim, dtype=wide), group


def true_gradients(case: Joined) -> tuple[Tensor, Tensor]:
    """The derivative of turning and splitting by autograd, in float64, and its sum over all tokens."""
    *tensors, group = case
    queries, keys, values, cos, sin, bias = (part.double() for part in tensors if isinstance(part, Tensor))
    batch, length, heads, head_dim = keys.shape
    qkv = torch.zeros(batch * length, len(bias), dtype=torch.float64, requires_grad=True)
    turned = rotary.reference(qkv, cos, sin, head_dim=head_dim, group=group) if cos.shape[1] else qkv * 1
    apart = turned.view(batch, length, heads, group + 2, head_dim)
    parts = [apart[:, :, :, :group].flatten(2, 3), apart[:, :, :, group], apart[:, :, :, group + 1]]
    (gradient,) = torch.autograd.grad(parts, [qkv], [queries, keys, values])
    return gradient.view(batch, length, -1), gradient.sum(0)
