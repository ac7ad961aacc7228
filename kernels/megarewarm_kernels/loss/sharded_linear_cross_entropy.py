"""Head and cross entropy over a vocabulary that is divided between ranks, without gathering logits (Megatron-LM, 1909.08053).

Each rank has the logits of its rows. What the ranks tell each other about a token is three numbers, in one all-gather: the
largest logit, the sum of exponentials below it, and the target's logit where it lives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarewarm_kernels.loss import logits_in_place
from megarewarm_kernels.loss.linear_cross_entropy import check_copy
from megarewarm_kernels.loss.logit_passes import at_target, define_statistics, log_terms, loss_of, place_of
from megarewarm_kernels.loss.logits_in_place import even_chunk, gathered
from megarewarm_kernels.operators import check_floats, exact

MIB = 2**20


def sharded_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup,
    vocab_size: int,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    memory_budget: int = 64 * MIB,
    kernel: str = "auto",
    low: Tensor | None = None,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``linear_cross_entropy`` of a head W (v, h) whose rows are divided between the T ranks of ``group``.

    Args:
        hidden: (t, h), equal on all ranks, any floating dtype.
        weight: (ceil(v / T), h), the rows of W from rank * ceil(v / T) on; those from ``vocab_size`` on are padding, of any
            finite numbers.
        targets: (t,) int64, equal on all ranks, each below ``vocab_size`` or equal to ``ignore_index``.
        group: the ranks; each calls this function with the same sizes and settings.
        vocab_size: v without padding.
        ignore_index, z_loss, kernel, low, upstream: as for ``linear_cross_entropy``; z-loss takes log-sum-exp over all ranks'
            logits.
        memory_budget: bytes of logits (with "reference": of logits in fp32) that are held at a time, at least one token's.

    Returns:
        The loss, a scalar in fp32 (fp64 for fp64 inputs), and the count of tokens, an int64 scalar, equal on all ranks. The
        gradient of ``hidden`` is this rank's part of a sum over the group. Gradients are computed in the forward pass.
        Raises ValueError on wrong shapes or dtypes, for another ``kernel``, and for "triton" without it.
    """
    check_shards(hidden, weight, targets, group, vocab_size)
    rank, (tokens, rows) = group.rank(), (hidden.shape[0], weight.shape[0])
    valid = max(0, min(rows, vocab_size - rank * rows))
    check_floats(hidden=hidden, weight=weight)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    check_copy(low, weight, dtype)
    triton = logits_in_place.applies(kernel, hidden.device, dtype)
    # all ranks must cut alike, so the size of a chunk comes from the shape that is the same everywhere
    chunk = (logits_in_place.chunk_of if triton else _chunk)(tokens, rows, dtype, memory_budget)
    tracked = torch.is_grad_enabled()
    needs = tracked and hidden.requires_grad, tracked and weight.requires_grad
    settings = rank * rows, valid, ignore_index, z_loss, chunk, dtype, *needs, group
    count = (targets != ignore_index).sum()
    if triton and upstream is not None and logits_in_place.takes_upstream(weight, dtype):
        return logits_in_place.KnownUpstream.apply(hidden, weight, low, targets, upstream, *settings), count
    return _ShardedLinearCrossEntropy.apply(hidden, weight, low, targets, triton, settings), count


def check_shards(hidden: Tensor, weight: Tensor, targets: Tensor, group: dist.ProcessGroup, vocab_size: int) -> None:
    """Raise ValueError unless the shapes are those of ``sharded_linear_cross_entropy``."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"need hidden (t, h) and weight (v / T, h), got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"need one target per token, got {tuple(targets.shape)} for hidden {tuple(hidden.shape)}")
    if not 0 < vocab_size <= weight.shape[0] * group.size():
        raise ValueError(f"vocab_size {vocab_size} does not lie in 1..{weight.shape[0]} rows x {group.size()} ranks")


def _chunk(tokens: int, rows: int, dtype: torch.dtype, memory_budget: int) -> int:
    """Tokens per chunk: as few chunks of logits in fp32 as the budget allows, of equal size."""
    return even_chunk(tokens, max(1, memory_budget // (rows * exact(dtype).itemsize)))


class _ShardedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, low: Tensor | None, targets: Tensor, triton: bool, settings: tuple[Any, ...]
    ) -> Tensor:
        ctx.compute = logits_in_place.compute if triton else _compute
        ctx.settings = settings
        with torch.autocast(hidden.device.type, enabled=False):
            loss, *ctx.grads = ctx.compute(hidden, weight, targets, *settings, low=low)
        ctx.save_for_backward(hidden, weight, low, targets)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, low, targets = ctx.saved_tensors
        # The gradients are given away, so that .grad takes them without a copy; a second backward needs new ones.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            with torch.autocast(hidden.device.type, enabled=False):
                _, *grads = ctx.compute(hidden, weight, targets, *ctx.settings, low=low)
        *_, need_hidden, need_weight, _ = ctx.settings
        grad_hidden = grads[0].mul_(upstream).to(hidden.dtype) if need_hidden else None
        grad_weight = grads[1].mul_(upstream).to(weight.dtype) if need_weight else None
        return grad_hidden, grad_weight, None, None, None, None


def _compute(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    first: int,
    valid: int,
    ignore_index: int,
    z_loss: float,
    chunk: int,
    dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    group: dist.ProcessGroup,
    low: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and the gradients of ``hidden`` (this rank's part) and of ``weight``, in plain PyTorch."""
    kind = exact(dtype)
    head = (weight if low is None else low)[:valid].to(dtype)
    loss = hidden.new_zeros((), dtype=torch.float64)  # however many chunks there are
    grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else (0,), dtype=dtype)
    grad_weight = weight.new_zeros(weight.shape if need_weight else (0,), dtype=kind)
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        target, ignored = targets[part], targets[part] == ignore_index
        x = hidden[part].to(dtype).masked_fill(ignored[:, None], 0)
        logits = torch.mm(x, head.t()).to(kind) if valid else x.new_empty((len(x), 0), dtype=kind)
        found = define_statistics(logits, target, first, valid, ignore_index)
        log_sum, log_p = log_terms(gathered(found, group))
        loss += loss_of(log_sum, log_p, ignored, z_loss)
        if not valid or not (need_hidden or need_weight):
            continue
        p = logits.sub_(log_sum[:, None]).exp_()
        if z_loss:
            p.mul_(1 + 2 * z_loss * log_sum[:, None])
        local, here = place_of(target, first, valid, ignore_index)
        local, here = local[:, None], here[:, None]
        p.scatter_(1, local, torch.where(here, at_target(log_sum, log_p, z_loss)[:, None], p.gather(1, local)))
        dz = p.to(dtype)
        if need_hidden:
            grad_hidden[part] = torch.mm(dz, head).masked_fill_(ignored[:, None], 0)
        if need_weight:
            grad_weight[:valid] += (dz.t() @ x).to(kind)
    return loss.to(kind), grad_hidden, grad_weight
