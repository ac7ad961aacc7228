"""AdamW in one pass over a flat parameter, with the gradient's scale and a low-precision copy; the squared norm for the scale.

AdamW is Algorithm 2 of Loshchilov and Hutter 2019 (arXiv 1711.05101), in PyTorch's form: with g the scaled gradient at step n,

    p <- p (1 - lr decay),  m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,
    p <- p - lr / (1 - b1^n) m / (sqrt(v) / sqrt(1 - b2^n) + eps).

Bytes moved for each parameter: p, m and v in fp32 read and written, 24, the gradient 4 (fp32) or 2 (bf16), the copy 2.
``squared_norm`` reads the gradient once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megarewarm_kernels.operators import HAS_TRITON, LAUNCH, check_floats, define, exact

_BLOCK = 1024
_WALK = 16  # blocks of which one program adds up the squares


def adamw_(
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    scale: Tensor | None = None,
    copy: Tensor | None = None,
) -> None:
    """One step of AdamW, in place.

    Args:
        parameter: contiguous, fp32 (or fp64): the weights as the optimizer keeps them.
        gradient: contiguous, of the same shape, any floating dtype.
        first, second: exp_avg and exp_avg_sq, like ``parameter``.
        step: of this update, counted from 1.
        lr, betas, eps, weight_decay: as for torch.optim.AdamW; decay is multiplied by lr.
        scale: () fp32 on the device, by which the gradient is multiplied first (clipping, loss scale); None: 1. It is read on
            the device, so that nothing waits for it.
        copy: where the new weights are written in another dtype, of the same shape; None: nowhere.

    Raises ValueError for shapes that differ, other dtypes, tensors that are not contiguous and a step below 1.
    """
    for name, other in (("gradient", gradient), ("first", first), ("second", second), ("copy", copy)):
        if other is not None and (other.shape != parameter.shape or not other.is_contiguous()):
            raise ValueError(f"'{name}' is {tuple(other.shape)}, need {tuple(parameter.shape)} without gaps, as 'parameter'")
    check_floats(gradient=gradient, copy=copy)
    if parameter.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"'parameter' is {parameter.dtype}: give the fp32 weights, and the others as 'copy'")
    if not parameter.is_contiguous() or first.dtype != parameter.dtype or second.dtype != parameter.dtype:
        raise ValueError(f"'parameter' has no gaps and the moments have its dtype {parameter.dtype}")
    if step < 1:
        raise ValueError(f"step {step}: steps are counted from 1")
    beta1, beta2 = betas
    corrections = lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
    one = torch.ones((), dtype=torch.float32, device=parameter.device) if scale is None else scale
    _step(parameter, gradient, first, second, copy, one, 1 - lr * weight_decay, beta1, beta2, eps, *corrections)


def squared_norm(x: Tensor) -> Tensor:
    """The sum of squares of ``x``, a contiguous tensor of any shape and floating dtype, as () fp32 (fp64 for fp64).

    Added up in the same order at every run. Squares are fp32, their partial sums are added in fp64. Raises ValueError for a
    tensor with gaps or of another dtype.
    """
    if not x.is_contiguous():
        raise ValueError("squared_norm needs a tensor without gaps")
    check_floats(x=x)
    result: Tensor = _squared_norm(x)
    return result


def _define_step(
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    copy: Tensor | None,
    scale: Tensor,
    keep: float,
    beta1: float,
    beta2: float,
    eps: float,
    rate: float,
    root: float,
) -> None:
    g = gradient.to(parameter.dtype) * scale.to(parameter.dtype)
    first.mul_(beta1).add_(g, alpha=1 - beta1)
    second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    parameter.mul_(keep).addcdiv_(first, second.sqrt().mul_(root).add_(eps), value=-rate)
    if copy is not None:
        copy.copy_(parameter)


def _define_squared_norm(x: Tensor) -> Tensor:
    kind = exact(x.dtype)
    return x.to(kind).square().sum(dtype=torch.float64).to(kind)


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def adamw_step(  # type: ignore[no-untyped-def]
        parameter_ptr,
        gradient_ptr,
        first_ptr,
        second_ptr,
        copy_ptr,
        scale_ptr,
        size,
        keep,
        beta1,
        beta2,
        other1,
        other2,
        eps,
        rate,
        root,
        COPY: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < size
        gradient = tl.load(gradient_ptr + place, mask=inside, other=0.0).to(tl.float32) * tl.load(scale_ptr).to(tl.float32)
        first = tl.load(first_ptr + place, mask=inside, other=0.0) * beta1 + gradient * other1
        second = tl.load(second_ptr + place, mask=inside, other=0.0) * beta2 + gradient * gradient * other2
        parameter = tl.load(parameter_ptr + place, mask=inside, other=0.0) * keep
        parameter -= rate * (first / (tl.sqrt(second) * root + eps))
        tl.store(first_ptr + place, first, mask=inside)
        tl.store(second_ptr + place, second, mask=inside)
        tl.store(parameter_ptr + place, parameter, mask=inside)
        if COPY:
            tl.store(copy_ptr + place, parameter.to(copy_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def squares(x_ptr, partial_ptr, size, BLOCK: tl.constexpr, WALK: tl.constexpr):  # type: ignore[no-untyped-def]
        part = tl.program_id(0).to(tl.int64)
        total = tl.zeros((BLOCK,), tl.float32)
        for block in range(WALK):
            place = (part * WALK + block) * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + place, mask=place < size, other=0.0).to(tl.float32)
            total += x * x
        tl.store(partial_ptr + part, tl.sum(total, axis=0))

    def _kernel_step(
        parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, copy: Tensor | None, *rest: Any
    ) -> None:
        if parameter.dtype == torch.float64:
            _define_step(parameter, gradient, first, second, copy, *rest)
        elif parameter.numel():
            scale, keep, beta1, beta2, *others = rest
            target = parameter if copy is None else copy
            # 1 - beta in double precision: in fp32 its last digits would be lost
            numbers = keep, beta1, beta2, 1 - beta1, 1 - beta2, *others
            grid = (triton.cdiv(parameter.numel(), _BLOCK),)
            tensors = parameter, gradient, first, second, target, scale
            adamw_step[grid](*tensors, parameter.numel(), *numbers, COPY=copy is not None, BLOCK=_BLOCK, **LAUNCH)

    def _kernel_squared_norm(x: Tensor) -> Tensor:
        if x.dtype == torch.float64 or not x.numel():
            return _define_squared_norm(x)
        partial = torch.empty(triton.cdiv(x.numel(), _BLOCK * _WALK), dtype=torch.float32, device=x.device)
        squares[partial.shape](x, partial, x.numel(), BLOCK=_BLOCK, WALK=_WALK, **LAUNCH)
        return partial.sum(dtype=torch.float64).float()
else:
    _kernel_step = _kernel_squared_norm = None  # type: ignore[assignment]


def _shape_step(*arguments: Any) -> None:
    return None


_step = define(
    "adamw_", _define_step, shapes=_shape_step, kernel=_kernel_step, mutates=("parameter", "first", "second", "copy")
)
_squared_norm = define(
    "squared_norm", _define_squared_norm, shapes=lambda x: x.new_empty((), dtype=exact(x.dtype)), kernel=_kernel_squared_norm
)
