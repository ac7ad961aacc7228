"""Head, cross entropy and the divergence from a teacher's predictions in one operation that never holds all logits of either.

With z = W x, p = softmax(z) and the teacher's q = softmax(V y), one token's loss is -log p[target] + share KL(q || p) (Hinton
et al., arXiv 1503.02531, at temperature 1), whose gradient for z is (1 + share) p - onehot(target) - share q: one pass over a
chunk of logits gives both terms and their gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megarewarm_kernels.loss.logits_in_place import even_chunk
from megarewarm_kernels.operators import check_floats, define, exact
from megarewarm_kernels.products import accumulate

MIB = 2**20


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    share: float,
    valid_rows: int | None = None,
    teacher_rows: int | None = None,
    ignore_index: int = -100,
    memory_budget: int = 64 * MIB,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over tokens of the cross entropy plus ``share`` times KL(teacher || student), with the parts beside it.

    Args:
        hidden: (t, h), the student's. weight: (v, h), its head. targets: (t,) int64, below ``valid_rows``, or
            ``ignore_index``, which leaves the token out of both terms.
        teacher_hidden: (t, g), teacher_weight: (v', g) with at least ``teacher_rows`` rows; neither gets a gradient.
        share: weight of the divergence.
        valid_rows: rows of ``weight`` that are in the softmax; None: all.
        teacher_rows: those of the teacher's head, at most ``valid_rows``: it gives the others no probability; None: as many.
        memory_budget: bytes that the logits of a chunk may take, at least one token's worth.

    Returns:
        total: scalar, differentiable for ``hidden`` and ``weight``; parts: (2,), the cross entropy and the divergence, without
        gradients, both in fp32 (fp64 for fp64 inputs); count: tokens that have a target, int64. All stay on the device.

    FLOPs are the 6 t v h of ``linear_cross_entropy`` and 2 t v g for the teacher; bytes, beside the operands, some 10 passes
    over a chunk's logits in fp32. Softmaxes are computed in fp32, and W's gradient is summed over chunks in fp32. Raises
    ValueError on wrong shapes or dtypes.
    """
    rows = weight.shape[0] if valid_rows is None else valid_rows
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"need hidden (t, h) and weight (v, h), got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if teacher_hidden.shape[0] != hidden.shape[0] or teacher_hidden.shape[1:] != teacher_weight.shape[1:]:
        raise ValueError(
            f"need the teacher's hidden ({hidden.shape[0]}, g) and weight (v, g), got {tuple(teacher_hidden.shape)} and "
            f"{tuple(teacher_weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"need one target per token, got {tuple(targets.shape)} for hidden {tuple(hidden.shape)}")
    taught = rows if teacher_rows is None else teacher_rows
    if not 0 < rows <= weight.shape[0]:
        raise ValueError(f"valid_rows {rows} does not lie in 1..{weight.shape[0]}")
    if not 0 < taught <= min(rows, teacher_weight.shape[0]):
        raise ValueError(f"teacher_rows {taught} does not lie in 1..{min(rows, teacher_weight.shape[0])}")
    check_floats(hidden=hidden, weight=weight, teacher_hidden=teacher_hidden, teacher_weight=teacher_weight)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    per_token = rows * (2 * exact(dtype).itemsize + dtype.itemsize)
    most = max(1, memory_budget // per_token)
    tracked = torch.is_grad_enabled()
    needs = tracked and hidden.requires_grad, tracked and weight.requires_grad
    settings = rows, ignore_index, share, taught, even_chunk(len(hidden), most), dtype, *needs
    tensors = hidden, weight, targets, teacher_hidden.detach(), teacher_weight.detach()
    total, parts = Distillation.apply(_operator, share, settings, *tensors)
    return total, parts, (targets != ignore_index).sum()


def reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    share: float,
    valid_rows: int | None = None,
    teacher_rows: int | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of ``linear_distillation``: all logits at once."""
    rows = weight.shape[0] if valid_rows is None else valid_rows
    taught = rows if teacher_rows is None else teacher_rows
    kept = targets != ignore_index
    logits, wanted = F.linear(hidden, weight[:rows])[kept], F.linear(teacher_hidden, teacher_weight[:taught])[kept]
    log_p, log_q = (each.to(exact(each.dtype)).log_softmax(1) for each in (logits, wanted.detach()))
    cross = F.nll_loss(log_p, targets[kept], reduction="sum")
    divergence = F.kl_div(log_p[:, :taught], log_q, reduction="sum", log_target=True)
    return cross + share * divergence, torch.stack([cross, divergence]).detach(), kept.sum()


class Distillation(torch.autograd.Function):
    """``compute(*tensors, *settings)``, which gives both losses and the gradients of the first two of five ``tensors``, as one
    pass; backward multiplies these by the upstream gradient, in place. ``settings`` end with whether each is needed."""

    @staticmethod
    def forward(
        ctx: Any, compute: Callable[..., Any], share: float, settings: tuple[Any, ...], *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.compute, ctx.settings = compute, settings
        with torch.autocast(tensors[0].device.type, enabled=False):
            parts, *ctx.grads = compute(*tensors, *settings)
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(parts)
        return parts[0] + share * parts[1], parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None  # given away; a second backward computes them again
        if grads is None:
            with torch.autocast(tensors[0].device.type, enabled=False):
                _, *grads = ctx.compute(*tensors, *ctx.settings)
        *_, need_hidden, need_weight = ctx.settings
        grad_hidden = grads[0].mul_(upstream).to(tensors[0].dtype) if need_hidden else None
        grad_weight = grads[1].mul_(upstream).to(tensors[1].dtype) if need_weight else None
        return None, None, None, grad_hidden, grad_weight, None, None, None


def _compute(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    rows: int,
    ignore_index: int,
    share: float,
    taught: int,
    chunk: int,
    dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both losses (2,), gradients of hidden (t, h) in ``dtype`` and of weight (v, h) in fp32, empty where not needed."""
    kind = exact(dtype)
    head, wanted_head = weight[:rows].to(dtype), teacher_weight[:taught].to(dtype)
    parts = hidden.new_zeros(2, dtype=torch.float64)  # however many chunks there are
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else (0,), dtype=dtype)
    grad_weight = weight.new_empty(weight.shape if need_weight else (0,), dtype=kind)
    if need_weight:
        (grad_weight[rows:] if len(hidden) else grad_weight).zero_()
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        ignored = (targets[part] == ignore_index)[:, None]
        target = targets[part, None].masked_fill(ignored, 0)
        x = hidden[part].to(dtype)
        # a masked row may hold anything: what is computed of it is thrown away, not multiplied by 0
        log_p = torch.mm(x, head.t()).to(kind).log_softmax(1)
        log_q = torch.mm(teacher_hidden[part].to(dtype), wanted_head.t()).to(kind).log_softmax(1)
        q = log_q.exp()
        parts[0] -= log_p.gather(1, target).masked_fill(ignored, 0).sum()
        parts[1] += log_q.sub_(log_p[:, :taught]).mul_(q).sum(1, keepdim=True).masked_fill(ignored, 0).sum()
        if not (need_hidden or need_weight):
            continue
        dz = log_p.exp_().mul_(1 + share)
        dz[:, :taught].sub_(q, alpha=share)
        dz.scatter_add_(1, target, torch.full_like(target, -1, dtype=kind))
        dz = dz.masked_fill_(ignored, 0).to(dtype)
        if need_hidden:
            torch.mm(dz, head, out=grad_hidden[part])
        if need_weight:
            accumulate(grad_weight[:rows], dz, x.masked_fill(ignored, 0), first=start == 0)
    return parts.to(kind), grad_hidden, grad_weight


def _shapes(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, dtype, need_hidden, need_weight = rest
    return (
        hidden.new_empty(2, dtype=exact(dtype)),
        hidden.new_empty(hidden.shape if need_hidden else (0,), dtype=dtype),
        weight.new_empty(weight.shape if need_weight else (0,), dtype=exact(dtype)),
    )


_operator = define("linear_distillation", _compute, shapes=_shapes)
