"""Differentiable collectives between the ranks of one tensor-parallel group (arXiv 1909.08053, 2205.05198).

Each is the adjoint of another: copy of all-reduce, all-gather of reduce-scatter. Activations are (b, s, h) plain tensors;
gathering and scattering are along the sequence.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup
# torch 2.13 renamed them and warns of the old names
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def copy_to_group(x: Tensor, group: Group) -> Tensor:
    """The same tensor; its gradient is summed over the group, because each rank used it for a part of the result."""
    return _Copy.apply(x, group)


def sum_over_group(x: Tensor, group: Group) -> Tensor:
    """The sum of the ranks' tensors, on every rank. ``x`` is overwritten; its gradient passes unchanged."""
    return _Sum.apply(x, group)


def gather_sequence(x: Tensor, group: Group) -> Tensor:
    """(b, s / T, h) on each of T ranks to (b, s, h) on all of them; the gradient is summed and scattered back."""
    return _Gather.apply(x, group)


def scatter_sequence_sum(x: Tensor, group: Group) -> Tensor:
    """The sum of the ranks' (b, s, h), of which each rank keeps its (b, s / T, h); the gradient is gathered."""
    return _Scatter.apply(x, group)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # a new tensor, because the incoming one may be another branch's gradient too
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        if not x.is_contiguous():
            x = x.contiguous()
        else:
            ctx.mark_dirty(x)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _reduce_scatter(grad, ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _all_gather(grad, ctx.group), None


def _all_gather(x: Tensor, group: Group) -> Tensor:
    """(b, s / T, h) to (b, s, h). The collective has shape (T, b, s / T, h), which for one sequence is the result without a
    copy."""
    ranks = group.size()
    batch, part, *rest = x.shape
    gathered = x.new_empty((ranks * batch, part, *rest))
    all_gather_single(gathered, x.contiguous(), group=group)
    return gathered.view(ranks, batch, part, *rest).transpose(0, 1).reshape(batch, ranks * part, *rest)


def _reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """(b, s, h), summed over ranks, to this rank's (b, s / T, h)."""
    ranks = group.size()
    batch, length, *rest = x.shape
    parts = x.reshape(batch, ranks, length // ranks, *rest).transpose(0, 1)
    parts = parts.reshape(ranks * batch, length // ranks, *rest).contiguous()
    mine = x.new_empty((batch, length // ranks, *rest))
    reduce_scatter_single(mine, parts, group=group)
    return mine
