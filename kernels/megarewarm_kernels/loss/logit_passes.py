"""The two passes over logits between the products of head and loss: three numbers of each row, then the gradient in place.

With z a row of logits and lse = log sum exp z, the loss is lse - z[target] + c lse^2 and its gradient p (1 + 2 c lse) - onehot,
p = softmax(z); c is the coefficient of PaLM's z-loss (arXiv 2204.02311, section 5). The numbers are the largest logit, the
sum of exponentials below it (Milakov and Gimelshein 2018, arXiv 1805.02867, for the single read) and the target's logit.

Bytes moved for each logit, bf16: 2 read by the statistics, 2 read and 2 written by the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megarewarm_kernels.operators import HAS_TRITON, LAUNCH, define, exact

_BLOCK = 4096  # columns at a time
_WARPS = 8  # 16 columns for each thread


def log_terms(found: Tensor) -> tuple[Tensor, Tensor]:
    """(lse, log of the target's p), each (c,), from statistics (3, c). Large numbers cancel before the small one is added."""
    largest, sums, target = found.unbind(0)
    rest = sums.log()
    return largest + rest, (target - largest) - rest


def loss_of(log_sum: Tensor, log_p: Tensor, ignored: Tensor, z_loss: float) -> Tensor:
    """The loss summed over a chunk's tokens, ()."""
    each = log_p - z_loss * log_sum.square() if z_loss else log_p
    return -each.masked_fill(ignored, 0).sum()


def at_target(log_sum: Tensor, log_p: Tensor, z_loss: float) -> Tensor:
    """The gradient of the target's logit, p - 1 without cancellation."""
    minus_one = torch.expm1(log_p)
    return minus_one.add_(2 * z_loss * log_sum * log_p.exp()) if z_loss else minus_one


def place_of(targets: Tensor, first: int, valid: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(the target's column or 0, whether it lies in columns first..first + valid and counts), each (c,)."""
    local = targets - first
    here = (local >= 0) & (local < valid) & (targets != ignore_index)
    return local.masked_fill(~here, 0), here


def define_statistics(logits: Tensor, targets: Tensor, first: int, valid: int, ignore_index: int) -> Tensor:
    """Statistics (3, c) in plain PyTorch: largest logit, sum of exponentials below it, the target's logit or 0.

    ``logits`` (c, w), of which the first ``valid`` columns are classes ``first`` and following; ``targets`` (c,) int64.
    """
    wide = logits[:, :valid].to(exact(logits.dtype))
    found = wide.new_zeros((3, len(wide)))
    if not valid:
        found[0] = -torch.inf
        return found
    local, here = place_of(targets, first, valid, ignore_index)
    torch.amax(wide, 1, out=found[0])
    torch.sum(torch.exp(wide - found[0][:, None]), 1, out=found[1])
    found[2] = wide.gather(1, local[:, None])[:, 0].masked_fill_(~here, 0)
    return found


def _define_gradient(
    logits: Tensor,
    targets: Tensor,
    log_sum: Tensor,
    special: Tensor,
    first: int,
    valid: int,
    ignore_index: int,
    z_loss: float,
    upstream: Tensor | None = None,
) -> None:
    """``upstream``: () fp32, by which the gradient is multiplied before it is rounded; None: 1."""
    kind = exact(logits.dtype)
    dz = torch.zeros_like(logits, dtype=kind)
    if valid:
        local, here = place_of(targets, first, valid, ignore_index)
        factor = 1 + 2 * z_loss * log_sum
        p = torch.exp(logits[:, :valid].to(kind) - log_sum[:, None]) * factor[:, None]
        local = local[:, None]
        p.scatter_(1, local, torch.where(here[:, None], special[:, None], p.gather(1, local)))
        dz[:, :valid] = p.masked_fill_((targets == ignore_index)[:, None], 0)
    logits.copy_(dz if upstream is None else dz.mul_(upstream))


if HAS_TRITON:
    import triton
    import triton.language as tl

    from megarewarm_kernels.operators import LOG2_E, PREFETCH

    @triton.jit
    def statistics_pass(  # type: ignore[no-untyped-def]
        logits_ptr, targets_ptr, found_ptr, rows, width, stride, first, valid, ignored, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)  # rows x columns may pass 2^31
        start = logits_ptr + row * stride
        largest = -float("inf")
        sums = tl.zeros((BLOCK,), tl.float32)
        for at in tl.range(0, valid, BLOCK, num_stages=PREFETCH):
            column = at + tl.arange(0, BLOCK)
            # read to the row's end, which is aligned where the number of classes is not, and keep the classes
            x = tl.load(start + column, mask=column < width, other=0.0).to(tl.float32)
            x = tl.where(column < valid, x, -float("inf"))
            above = tl.maximum(largest, tl.max(x, axis=0))
            level = tl.where(above == -float("inf"), 0.0, above)  # -inf minus itself would be no number
            sums = sums * tl.exp2((largest - level) * LOG2_E) + tl.exp2((x - level) * LOG2_E)
            largest = above
        target = tl.load(targets_ptr + row)
        local = target - first
        here = (local >= 0) & (local < valid) & (target != ignored)
        z = tl.load(start + local, mask=here, other=0.0).to(tl.float32)
        tl.store(found_ptr + row, largest)
        tl.store(found_ptr + rows + row, tl.sum(sums, axis=0))
        tl.store(found_ptr + 2 * rows + row, z)

    @triton.jit
    def gradient_pass(  # type: ignore[no-untyped-def]
        logits_ptr,
        targets_ptr,
        log_sum_ptr,
        special_ptr,
        upstream_ptr,
        width,
        stride,
        first,
        valid,
        ignored,
        z_loss,
        SCALED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        target = tl.load(targets_ptr + row)
        log_sum = tl.load(log_sum_ptr + row)
        place = logits_ptr + row * stride + column
        x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        dz = tl.exp2((x - log_sum) * LOG2_E) * (1.0 + 2.0 * z_loss * log_sum)
        # in 32 bits, as the columns are; a target elsewhere matches none, or a padding column, which becomes 0
        dz = tl.where(column == (target - first).to(tl.int32), tl.load(special_ptr + row), dz)
        dz = tl.where(column < tl.where(target == ignored, 0, valid), dz, 0.0)
        if SCALED:
            dz *= tl.load(upstream_ptr)
        tl.store(place, dz.to(logits_ptr.dtype.element_ty), mask=inside)

    def _kernel_statistics(logits: Tensor, targets: Tensor, first: int, valid: int, ignore_index: int) -> Tensor:
        if logits.dtype == torch.float64:
            return define_statistics(logits, targets, first, valid, ignore_index)
        rows, width = _rows(logits)
        found = torch.empty((3, rows), dtype=torch.float32, device=logits.device)
        if rows:
            numbers = rows, width, logits.stride(0), first, valid, ignore_index
            statistics_pass[(rows,)](logits, targets.contiguous(), found, *numbers, BLOCK=_BLOCK, num_warps=_WARPS, **LAUNCH)
        return found

    def _kernel_gradient(logits: Tensor, targets: Tensor, log_sum: Tensor, special: Tensor, *rest: Any) -> None:
        if logits.dtype == torch.float64:
            _define_gradient(logits, targets, log_sum, special, *rest)
            return
        *numbers, upstream = (*rest, None)[:5]
        rows, width = _rows(logits)
        if rows and width:
            vectors = targets.contiguous(), log_sum.contiguous(), special.contiguous(), upstream
            choice = {"SCALED": upstream is not None, "BLOCK": _BLOCK, "num_warps": _WARPS}
            grid = (rows, triton.cdiv(width, _BLOCK))
            gradient_pass[grid](logits, *vectors, width, logits.stride(0), *numbers, **choice, **LAUNCH)

    def _rows(logits: Tensor) -> tuple[int, int]:
        rows, width = logits.shape
        if width > 1 and logits.stride(1) != 1:
            raise ValueError(f"logits are read and written along their rows: need stride 1, got {logits.stride(1)}")
        return rows, width
else:
    _kernel_statistics = _kernel_gradient = None  # type: ignore[assignment]


def _shape_gradient(*arguments: Any) -> None:
    return None


logit_statistics = define(
    "logit_statistics",
    define_statistics,
    shapes=lambda logits, *_: logits.new_empty((3, logits.shape[0]), dtype=exact(logits.dtype)),
    kernel=_kernel_statistics,
)
logit_gradient_ = define(
    "logit_gradient_", _define_gradient, shapes=_shape_gradient, kernel=_kernel_gradient, mutates=("logits",)
)
