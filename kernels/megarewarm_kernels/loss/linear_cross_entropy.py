"""Head and cross entropy in one operation that never holds all logits.

The gradients are computed in the forward pass, chunk of tokens by chunk of tokens, in the buffer that held the logits. Here are
the function and its definition; the form with Triton kernels is in ``logits_in_place``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megarewarm_kernels.loss import logits_in_place
from megarewarm_kernels.loss.logit_passes import at_target, loss_of
from megarewarm_kernels.operators import check_floats, define, exact
from megarewarm_kernels.products import accumulate

MIB = 2**20
_BLOCK = 4 * MIB  # of logits in fp32: they stay in a CPU's caches from one pass to the next
_TINY = 1e-30  # a p above it has a logarithm with all digits of fp32


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    valid_rows: int | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    memory_budget: int = 64 * MIB,
    kernel: str = "auto",
    low: Tensor | None = None,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of ``-log softmax(z)[target] + z_loss logsumexp(z)^2`` with z = hidden @ weight.T, and their number.

    Args:
        hidden: (t, h), any strides, any floating dtype.
        weight: (v, h), the head.
        targets: (t,) int64, each below ``valid_rows`` or equal to ``ignore_index``, which leaves the token out.
        valid_rows: rows of ``weight`` that are in the softmax; the rest is padding, of any finite numbers, and gets no
            gradient. None: all.
        ignore_index: the target that means "no target".
        z_loss: the coefficient of the square of log-sum-exp (PaLM, arXiv 2204.02311, section 5, has 1e-4).
        memory_budget: bytes that the logits and their gradient may take, at least one token's worth.
        kernel: "triton"; "reference" for plain PyTorch; "auto" for Triton where it is there and the tensors are on CUDA,
            in at most fp32.
        low: ``weight`` in the dtype of the products, where it is there already; None: it is cast.
        upstream: () fp32 on the tensors' device, the gradient that the loss will get, where the caller knows it; see below.

    Returns:
        The loss, a scalar in fp32 (fp64 for fp64 inputs), and the count, an int64 scalar. Both stay on the device.

    With z = W x and p = softmax(z), the gradient of one token's loss is ``(p (1 + 2 z_loss logsumexp(z)) - onehot(target)) W``
    for x, and the outer product of the bracket with x for W. Softmax and the target's ``p - 1`` are computed in fp32 and
    W's gradient is summed over chunks in fp32, whatever the inputs. Under autocast both matrices are multiplied in
    autocast's dtype. Backward only scales the stored gradients; a second backward computes them again. With Triton, logits
    exist once, in the products' dtype, and their gradient in their place.

    ``upstream`` saves passes over both gradients, with Triton, in bf16 and fp32, where W is a leaf in fp32 or frozen; else it
    is not used. The logits' gradient is multiplied by it before it is rounded, and the forward pass adds W's gradient to
    ``weight.grad`` (made where it is None) by the product itself: no hook and no ``autograd.grad`` sees it. Backward must then
    be called, once, with that number, which the device checks.

    Raises ValueError on wrong shapes or dtypes, for another ``kernel``, and for "triton" where it can't be had.
    """
    rows = weight.shape[0] if valid_rows is None else valid_rows
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"need hidden (t, h) and weight (v, h), got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"need one target per token, got {tuple(targets.shape)} for hidden {tuple(hidden.shape)}")
    if not 0 < rows <= weight.shape[0]:
        raise ValueError(f"valid_rows {rows} does not lie in 1..{weight.shape[0]}")
    check_floats(hidden=hidden, weight=weight)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    check_copy(low, weight, dtype)
    tracked = torch.is_grad_enabled()
    needs = tracked and hidden.requires_grad, tracked and weight.requires_grad
    count = (targets != ignore_index).sum()
    triton = logits_in_place.applies(kernel, hidden.device, dtype)
    tensors = hidden, weight, low, targets
    if triton:
        chunk = logits_in_place.chunk_of(hidden.shape[0], rows, dtype, memory_budget)
        if upstream is not None and logits_in_place.takes_upstream(weight, dtype):
            settings = 0, rows, ignore_index, z_loss, chunk, dtype, *needs, None
            return logits_in_place.KnownUpstream.apply(*tensors, upstream, *settings), count
    else:
        chunk = _chunk(hidden.shape[0], rows, dtype, memory_budget, device)
    return _LinearCrossEntropy.apply(*tensors, rows, ignore_index, z_loss, chunk, dtype, triton, *needs), count


def reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    valid_rows: int | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The definition of ``linear_cross_entropy``: all logits at once, in the inputs' dtype, the loss in fp32 or more."""
    logits = F.linear(hidden, weight[:valid_rows])
    logits = logits.to(exact(logits.dtype))
    loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(1).square().masked_fill(targets == ignore_index, 0).sum()
    return loss, (targets != ignore_index).sum()


def check_copy(low: Tensor | None, weight: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless ``low`` may be a copy of ``weight`` in ``dtype``."""
    if low is not None and (low.shape != weight.shape or low.dtype != dtype):
        raise ValueError(f"'low' is {tuple(low.shape)} in {low.dtype}, need {tuple(weight.shape)} in {dtype}")


def _chunk(tokens: int, rows: int, dtype: torch.dtype, memory_budget: int, device: str) -> int:
    """Tokens per chunk: as few chunks as the budget allows, of equal size, in whole multiples of 16 where it matters."""
    per_token = rows * dtype.itemsize
    if dtype != exact(dtype) and device == "cpu":
        memory_budget -= min(_BLOCK, memory_budget * 2 // 3)
    elif dtype != exact(dtype):
        per_token += rows * exact(dtype).itemsize
    most = max(1, memory_budget // per_token)
    return min(most, -(-logits_in_place.even_chunk(tokens, most) // 16) * 16)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients from one pass; backward multiplies them by the upstream gradient, in place."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, low: Tensor | None, targets: Tensor, *rest: Any) -> Tensor:
        ctx.arguments = rest
        with torch.autocast(hidden.device.type, enabled=False):
            loss, *ctx.grads = _operator(hidden, weight, low, targets, *ctx.arguments)
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
                _, *grads = _operator(hidden, weight, low, targets, *ctx.arguments)
        *_, need_hidden, need_weight = ctx.arguments
        grad_hidden = grads[0].mul_(upstream).to(hidden.dtype) if need_hidden else None
        grad_weight = grads[1].mul_(upstream).to(weight.dtype) if need_weight else None
        return grad_hidden, grad_weight, *(None,) * 10


def _compute(
    hidden: Tensor,
    weight: Tensor,
    low: Tensor | None,
    targets: Tensor,
    rows: int,
    ignore_index: int,
    z_loss: float,
    chunk: int,
    dtype: torch.dtype,
    triton: bool,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (), gradient of hidden (t, h) in ``dtype``, gradient of weight (v, h) in fp32; empty where not needed."""
    if triton:
        settings = ignore_index, z_loss, chunk, dtype, need_hidden, need_weight
        return logits_in_place.compute(hidden, weight, targets, 0, rows, *settings, low=low)
    tokens, width = hidden.shape
    kind = exact(dtype)
    head = (weight if low is None else low)[:rows].to(dtype)
    loss = hidden.new_zeros((), dtype=torch.float64)  # however many chunks there are
    grad_hidden = hidden.new_empty((tokens, width) if need_hidden else (0,), dtype=dtype)
    grad_weight = weight.new_empty(weight.shape if need_weight else (0,), dtype=kind)
    if need_weight:
        (grad_weight[rows:] if tokens else grad_weight).zero_()
    buffer = hidden.new_empty((min(chunk, tokens), rows), dtype=dtype)
    block, blocks = len(buffer), kind != dtype and hidden.device.type == "cpu"
    if blocks:
        block = max(1, min(block, _BLOCK // (rows * kind.itemsize)))
    buffer_exact = buffer if kind == dtype else hidden.new_empty((block, rows), dtype=kind)

    for start in range(0, tokens, chunk):
        part = slice(start, min(start + chunk, tokens))
        ignored = (targets[part] == ignore_index)[:, None]
        target = targets[part, None].masked_fill(ignored, 0)
        # A zero row of x removes an ignored token from W's gradient, so no pass over its logits is needed.
        x = hidden[part].to(dtype).masked_fill(ignored, 0)
        dz = torch.mm(x, head.t(), out=buffer[: len(x)])
        for first in range(0, len(x), block):
            some = slice(first, min(first + block, len(x)))
            logits = dz[some]
            p = logits if kind == dtype else buffer_exact[: len(logits)].copy_(logits)
            z_target = p.gather(1, target[some])
            z_max = None if blocks else p.amax(1, keepdim=True)
            torch.softmax(p, 1, out=p)
            p_target = p.gather(1, target[some]) if blocks else None
            if p_target is not None and p_target.min() > _TINY:
                log_p = p_target.log_()
                log_sum = z_target - log_p
            else:
                # The largest p is exp(z_max - logsumexp): reading it is cheaper than a logsumexp of its own, and it is >= 1/v.
                # Large numbers cancel first, so that the logarithm of a p near 1 keeps its digits.
                z_max = logits.amax(1, keepdim=True).to(kind) if z_max is None else z_max
                log_largest = p.amax(1, keepdim=True).log_()
                log_p, log_sum = (z_target - z_max) + log_largest, z_max - log_largest
            loss += loss_of(log_sum, log_p, ignored[some], z_loss)
            if not (need_hidden or need_weight):
                continue
            if z_loss:
                p.mul_(1 + 2 * z_loss * log_sum)
            p.scatter_(1, target[some], at_target(log_sum, log_p, z_loss))
            if p is not logits:
                logits.copy_(p)
        if need_hidden:
            torch.mm(dz, head, out=grad_hidden[part]).masked_fill_(ignored, 0)
        if need_weight:
            accumulate(grad_weight[:rows], dz, x, first=start == 0)
    return loss.to(kind), grad_hidden, grad_weight


def _shapes(hidden: Tensor, weight: Tensor, low: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, dtype, _triton, need_hidden, need_weight = rest
    return (
        hidden.new_empty((), dtype=exact(dtype)),
        hidden.new_empty(hidden.shape if need_hidden else (0,), dtype=dtype),
        weight.new_empty(weight.shape if need_weight else (0,), dtype=exact(dtype)),
    )


# An operator of its own, so that torch.compile passes it through whole. The derivative stays outside, in the Function.
_operator = define("linear_cross_entropy", _compute, shapes=_shapes)
