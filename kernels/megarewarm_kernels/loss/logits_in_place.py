"""Head and loss with Triton: one chunk of logits at a time in the dtype of the products, overwritten by its own gradient.

Shared by the loss on one device and the loss over a divided vocabulary. The products are torch.mm; nothing waits for the GPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarewarm_kernels.loss.logit_passes import at_target, log_terms, logit_gradient_, logit_statistics, loss_of
from megarewarm_kernels.operators import HAS_TRITON, INTERPRETED
from megarewarm_kernels.products import accumulate

FORMS = ("auto", "triton", "reference")
# torch 2.13 renamed it and warns of the old name
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_ALIGNED = 64  # columns: rows begin on 128 bytes in bf16, whatever the size of the vocabulary


def applies(kernel: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``kernel`` ("auto", "triton", "reference") means Triton here. Raises ValueError where "triton" can't be had."""
    if kernel not in FORMS:
        raise ValueError(f"kernel is 'auto', 'triton' or 'reference', not '{kernel}'")
    there = HAS_TRITON and (device.type == "cuda" or (INTERPRETED and device.type == "cpu"))
    able = there and dtype in (torch.float32, torch.bfloat16, torch.float16)
    if kernel == "triton" and not able:
        raise ValueError(f"kernel 'triton' needs Triton, a CUDA device and at most fp32, got {dtype} on {device.type}")
    return able and kernel != "reference"


def width_of(rows: int) -> int:
    """Columns that the logits of so many rows of the head take in memory."""
    return -(-rows // _ALIGNED) * _ALIGNED


def chunk_of(tokens: int, rows: int, dtype: torch.dtype, memory_budget: int) -> int:
    """Tokens per chunk: all where the budget allows it, else as few chunks as it allows, equal, in whole multiples of 16."""
    most = max(1, memory_budget // (width_of(rows) * dtype.itemsize))
    if most >= tokens:
        return max(1, tokens)
    most = most // 16 * 16 or most
    return min(most, -(-even_chunk(tokens, most) // 16) * 16)


def even_chunk(tokens: int, most: int) -> int:
    """Tokens per chunk, at least 1: as few chunks of at most ``most`` tokens as there can be, of equal size."""
    return math.ceil(tokens / max(1, math.ceil(tokens / most))) or 1


def gathered(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Statistics (3, c) of the whole vocabulary from those of this rank's part."""
    everyone = mine.new_empty((group.size() * 3, mine.shape[1]))
    all_gather_single(everyone, mine, group=group)
    largest, sums, targets = everyone.view(-1, *mine.shape).unbind(1)
    maximum = largest.amax(0)
    return torch.stack([maximum, (sums * torch.exp(largest - maximum)).sum(0), targets.sum(0)])


def compute(
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
    group: dist.ProcessGroup | None = None,
    low: Tensor | None = None,
    upstream: Tensor | None = None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss () in fp32, gradient of hidden (t, h) in ``dtype``, gradient of weight (v, h) in fp32; empty where not needed.

    The first ``valid`` rows of ``weight`` are classes ``first`` and following, the others are padding; with a ``group``
    other ranks have the other classes, and the gradient of hidden is this rank's part of a sum. ``low``: ``weight`` in
    ``dtype``, if it is there. ``upstream``: () fp32, by which both gradients are multiplied; None: 1. ``total``: (v, h) fp32,
    to which that of weight is added, and which is returned in its place.
    """
    tokens = hidden.shape[0]
    # Padding rows are multiplied too, as far as they make the rows of logits aligned: their gradient is 0.
    columns = min(weight.shape[0], width_of(valid))
    head = (weight if low is None else low)[:columns].to(dtype)
    loss = hidden.new_zeros((), dtype=torch.float64)  # however many chunks there are
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else (0,), dtype=dtype)
    grad_weight = total
    if grad_weight is None:
        grad_weight = weight.new_empty(weight.shape if need_weight else (0,), dtype=torch.float32)
        if need_weight:
            (grad_weight[columns:] if tokens else grad_weight).zero_()
    if need_hidden and not columns:
        grad_hidden.zero_()
    buffer = torch.empty((min(chunk, tokens), width_of(columns)), dtype=dtype, device=hidden.device)

    for start in range(0, tokens, chunk):
        part = slice(start, min(start + chunk, tokens))
        x, target = hidden[part].to(dtype), targets[part]
        whole = buffer[: len(x)]
        logits = whole[:, :columns]
        if columns:
            torch.mm(x, head.t(), out=logits)
        found = logit_statistics(whole, target, first, valid, ignore_index)
        log_sum, log_p = log_terms(found if group is None else gathered(found, group))
        loss += loss_of(log_sum, log_p, target == ignore_index, z_loss)
        if not columns or not (need_hidden or need_weight):
            continue
        special = at_target(log_sum, log_p, z_loss)
        logit_gradient_(whole, target, log_sum, special, first, valid, ignore_index, z_loss, upstream)
        if need_hidden:
            torch.mm(logits, head, out=grad_hidden[part])
        if need_weight:
            accumulate(grad_weight[:columns], logits, x, first=start == 0 and total is None)
    return loss.float(), grad_hidden, grad_weight


def takes_upstream(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``KnownUpstream`` is right for ``weight`` and products in ``dtype``.

    Not in fp16, whose smallest number is 6e-8: the gradient of a wrong token's logit, some 1 / v, times a mean's 1 / targets
    keeps few digits, or none, where the loss's scale is below the number of targets. bf16 has fp32's exponents.
    """
    has_place = not weight.requires_grad or (weight.is_leaf and weight.dtype == torch.float32)
    return has_place and dtype in (torch.bfloat16, torch.float32) and torch.is_grad_enabled()


class KnownUpstream(torch.autograd.Function):
    """``compute`` where the loss's gradient is known (``takes_upstream``): after the forward pass that of weight is in
    ``weight.grad``, and that of hidden waits for the backward pass as it is. ``settings``: as ``compute``'s, to the group."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, low: Tensor | None, targets: Tensor, upstream: Tensor, *settings: Any
    ) -> Tensor:
        need_weight = ctx.needs_input_grad[1]
        total = weight.grad if need_weight else None
        given: tuple[Any, ...] = hidden, weight, targets, *settings, low, upstream, total
        with torch.autocast(hidden.device.type, enabled=False):
            loss, ctx.grad_hidden, found = compute(*given)
        if need_weight and total is None:
            weight.grad = found
        ctx.save_for_backward(upstream)
        ctx.dtype = hidden.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = ctx.saved_tensors
        if ctx.grad_hidden is None:
            raise RuntimeError("the weight has its gradient of this loss already: a second backward pass can't be had")
        torch._assert_async(grad == upstream, "the loss's gradient is not the 'upstream' that the gradients were multiplied by")
        grad_hidden, ctx.grad_hidden = ctx.grad_hidden, None
        return grad_hidden.to(ctx.dtype) if ctx.needs_input_grad[0] else None, *(None,) * (len(ctx.needs_input_grad) - 1)
