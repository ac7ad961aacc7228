"""RMSNorm of all queries of a token together, and of all its keys, on the fused projection: OLMo 2's (arXiv 2501.00656).

q' = q / sqrt(mean(q^2) + eps) w_q over the channels of all heads, and the same for keys with w_k, before the rotary positions.
Plain PyTorch on every device; the derivative is RMSNorm's (layer/rms_norm.py) and keeps the projection and two statistics for
each token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarewarm_kernels.attention.head_norms import apart, check
from megarewarm_kernels.operators import check_floats, exact

SumOver = Callable[[Tensor], Tensor]


def norm_widths(
    qkv: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    *,
    head_dim: int,
    group: int = 1,
    eps: float = 1e-6,
    sum_over: SumOver | None = None,
    ranks: int = 1,
) -> Tensor:
    """Norm all queries of a token together, and all its keys, in fp32 (fp64 for fp64), rounded once; copy the values.

    Args:
        qkv: (..., k x (group + 2) x d), any floating dtype: key head by key head its queries, its key and its value.
        query_weight: (k x group x d,), in the order of the heads in qkv. Any floating dtype.
        key_weight: (k x d,), likewise.
        head_dim: d.
        group: queries of each key head.
        eps: added to the mean square.
        sum_over: adds up the sums of squares, (tokens, 2) in fp32 (fp64 for fp64), of all ranks among which the heads are
            divided. Must be differentiable, and its derivative adds up the ranks' gradients too.
        ranks: how many those are; each has as many heads.

    Returns:
        A new tensor like qkv, which nothing here keeps: it may be rotated in place. Gradients come in the dtypes of the
        arguments. Raises ValueError on wrong shapes or dtypes, and on several ranks without ``sum_over``.
    """
    check(qkv, head_dim, group)
    channels = qkv.shape[-1] // (group + 2)
    for name, weight, width in (("query_weight", query_weight, channels * group), ("key_weight", key_weight, channels)):
        if weight.shape != (width,):
            raise ValueError(f"'{name}' is ({width},), got {tuple(weight.shape)}")
    if ranks < 1 or (ranks > 1 and sum_over is None):
        raise ValueError(f"{ranks} ranks need sum_over, which adds up what they have")
    check_floats(qkv=qkv, query_weight=query_weight, key_weight=key_weight)
    if sum_over is not None:
        return _composed(qkv, query_weight, key_weight, head_dim, group, eps, sum_over, ranks)
    result: Tensor = _NormWidths.apply(qkv, query_weight, key_weight, head_dim, group, eps)
    return result


def reference(
    qkv: Tensor, query_weight: Tensor, key_weight: Tensor, *, head_dim: int, group: int = 1, eps: float = 1e-6
) -> Tensor:
    """The definition of ``norm_widths`` in plain PyTorch, without ranks."""
    return _composed(qkv, query_weight, key_weight, head_dim, group, eps, lambda sums: sums, 1)


def _composed(
    qkv: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    head_dim: int,
    group: int,
    eps: float,
    sum_over: SumOver,
    ranks: int,
) -> Tensor:
    query, key, value = _parts(qkv, head_dim, group)
    query, key = (part.to(exact(qkv.dtype)) for part in (query, key))
    sums = torch.stack([part.square().sum((-3, -2, -1)) for part in (query, key)], -1)
    sums = sum_over(sums.view(-1, 2)).view(sums.shape)
    normed = [
        part * torch.rsqrt(total / (ranks * weight.numel()) + eps)[..., None, None, None] * weight.view(part.shape[-3:])
        for part, total, weight in zip((query, key), sums.unbind(-1), (query_weight, key_weight), strict=True)
    ]
    return torch.cat([*(part.to(qkv.dtype) for part in normed), value], -2).view(qkv.shape)


def _parts(qkv: Tensor, head_dim: int, group: int) -> tuple[Tensor, ...]:
    """Queries (..., k, group, d), keys and values (..., k, 1, d)."""
    return apart(qkv, head_dim, group).split([group, 1, 1], -2)


class _NormWidths(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, query_weight: Tensor, key_weight: Tensor, head_dim: int, group: int, eps: float
    ) -> Tensor:
        out = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        parts, results, kept = _parts(qkv, head_dim, group), _parts(out, head_dim, group), []
        for part, result, weight in zip(parts, results, (query_weight, key_weight), strict=False):
            squares = torch.linalg.vector_norm(part, dim=(-3, -2, -1), keepdim=True, dtype=exact(qkv.dtype)).square()
            rstd = torch.rsqrt(squares / weight.numel() + eps)
            result.copy_(part * rstd * weight.view(part.shape[-3:]))
            kept.append(rstd)
        results[2].copy_(parts[2])
        ctx.save_for_backward(qkv, query_weight, key_weight, *kept)
        ctx.head_dim, ctx.group = head_dim, group
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, query_weight, key_weight, *kept = ctx.saved_tensors
        dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        grads, parts, results = (_parts(each, ctx.head_dim, ctx.group) for each in (grad, qkv, dqkv))
        dweights = []
        for wide, part, result, weight, rstd in zip(grads, parts, results, (query_weight, key_weight), kept, strict=False):
            normed, scale = part * rstd, weight.view(part.shape[-3:])
            product = wide * normed
            dweights.append(product.flatten(0, -4).sum(0).view(-1).to(weight.dtype))
            along = (product * scale).sum((-3, -2, -1), keepdim=True) / weight.numel()
            result.copy_((wide * scale - normed * along) * rstd)
        results[2].copy_(grads[2])
        return dqkv, *dweights, None, None, None
