"""Head and cross entropy over a vocabulary that is divided between ranks, without gathering logits.

Each rank has the logits of its rows. What the ranks tell each other about a token is three numbers: the largest logit,
the sum of exponentials below it, and the target's logit where it lives.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarewarm.parallel.collectives import Group, all_gather_single


def sharded_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: Group,
    vocab_size: int,
    ignore_index: int = -100,
    memory_budget: int,
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of ``-log softmax(hidden @ W.T)[target]``, and how many tokens were in the sum.

    ``hidden``: (t, h), equal on all ranks. ``weight``: (ceil(v / T), h), rows rank * ceil(v / T) and following of W; rows
    from ``vocab_size`` on are padding. ``targets``: (t,) int64. Both results are equal on all ranks. The gradient of
    ``hidden`` is this rank's part of a sum over the group. Statistics are fp32, or fp64 for fp64 inputs. At most
    ``memory_budget`` bytes of logits are held at a time; the gradients are computed with them, in the forward pass.
    """
    rank, rows = group.rank(), weight.shape[0]
    valid = max(0, min(rows, vocab_size - rank * rows))
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    exact = torch.promote_types(dtype, torch.float32)
    # all ranks must cut alike, so the size of a chunk comes from the shape that is the same everywhere
    chunk = max(1, min(hidden.shape[0], memory_budget // (rows * exact.itemsize)))
    chunk = math.ceil(hidden.shape[0] / math.ceil(hidden.shape[0] / chunk)) if hidden.shape[0] else 1
    loss = _ShardedLinearCrossEntropy.apply(hidden, weight, targets, group, rank * rows, valid, ignore_index, chunk, dtype)
    return loss, (targets != ignore_index).sum()


class _ShardedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        group: Group,
        first: int,
        valid: int,
        ignore_index: int,
        chunk: int,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.arguments = (group, first, valid, ignore_index, chunk, dtype)
        # outside of training neither input asks for a gradient, and none is computed
        loss, *ctx.grads = _compute(hidden, weight, targets, *ctx.arguments, wanted=any(ctx.needs_input_grad[:2]))
        ctx.save_for_backward(hidden, weight, targets)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            _, *grads = _compute(hidden, weight, targets, *ctx.arguments, wanted=True)
        grad_hidden, grad_weight = (grad.mul_(upstream) for grad in grads)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), *(None,) * 7


def _compute(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    group: Group,
    first: int,
    valid: int,
    ignore_index: int,
    chunk: int,
    dtype: torch.dtype,
    *,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and the gradients of ``hidden`` (this rank's part) and of ``weight``."""
    exact = torch.promote_types(dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        head = weight[:valid].to(dtype)
        loss = hidden.new_zeros((), dtype=exact)
        grad_hidden = hidden.new_zeros(hidden.shape if wanted else (0,), dtype=dtype)
        grad_weight = weight.new_zeros(weight.shape if wanted else (0,), dtype=exact)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            ignored = targets[part] == ignore_index
            x = hidden[part].to(dtype).masked_fill(ignored[:, None], 0)
            local = targets[part] - first
            here = (local >= 0) & (local < valid) & ~ignored
            local = local.masked_fill(~here, 0)
            logits = torch.mm(x, head.t()).to(exact) if valid else x.new_empty((len(x), 0), dtype=exact)
            log_sum, log_p = _over_all_ranks(logits, local, here, group)
            loss -= log_p.masked_fill(ignored, 0).sum()
            if not wanted or not valid:
                continue
            p = logits.sub_(log_sum[:, None]).exp_()
            p_target = p.gather(1, local[:, None])
            exactly = torch.expm1(log_p)[:, None]  # p - 1 without cancellation
            p.scatter_(1, local[:, None], torch.where(here[:, None], exactly, p_target))
            dz = p.to(dtype)
            grad_hidden[part] = torch.mm(dz, head).masked_fill_(ignored[:, None], 0)
            grad_weight[:valid] += (dz.t() @ x).to(exact)
        return loss, grad_hidden, grad_weight


def _over_all_ranks(logits: Tensor, local: Tensor, here: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """(log of the sum of exponentials, log of the target's p) of each token over the whole vocabulary, each (t,)."""
    mine = logits.new_zeros((3, logits.shape[0]))
    if logits.shape[1]:
        torch.amax(logits, 1, out=mine[0])
        torch.sum(torch.exp(logits - mine[0][:, None]), 1, out=mine[1])
        mine[2] = logits.gather(1, local[:, None])[:, 0].masked_fill_(~here, 0)
    else:
        mine[0] = -torch.inf
    everyone = logits.new_empty((group.size() * 3, logits.shape[0]))
    all_gather_single(everyone, mine, group=group)
    largest, sums, targets = everyone.view(-1, *mine.shape).unbind(1)
    top = largest.amax(0)
    rest = (sums * torch.exp(largest - top)).sum(0).log_()
    return top + rest, (targets.sum(0) - top) - rest
