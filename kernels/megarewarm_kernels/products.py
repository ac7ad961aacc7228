"""Linear layers of weights that are kept in fp32 and multiplied in a lower dtype: the copy is given, not made at every call,
and a weight's gradient is added to what is there by the product itself.

autograd would make that gradient in the lower dtype, cast it and add it: for a weight of n values 2 n + 6 n + 12 n bytes beside
the product's own reads, at every micro-batch. The product that adds moves 8 n.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_SLICE = 4 * 2**20  # bytes of a product that are still in a CPU's caches when they are added


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, low_bias: Tensor | None) -> Tensor:
    """``x @ low.T + low_bias`` with the gradients of ``weight`` and ``bias``, of which ``low`` and ``low_bias`` are copies.

    Args:
        x: (..., h) in the dtype of ``low``.
        weight: (o, h), a leaf, fp32. bias: (o,) or None.
        low, low_bias: the same numbers, rounded to the dtype of the products.

    Returns:
        (..., o) in the dtype of ``low``. The gradient of x has that dtype. That of ``weight`` is added to ``weight.grad`` (see
        ``accumulate``; made where it is None), not passed through autograd: no hook and no ``autograd.grad`` sees it. That of
        ``bias`` has its dtype; on CUDA it is summed in fp32 to its end, elsewhere it is rounded once as autocast does. Raises
        ValueError for an x of another dtype.
    """
    if x.dtype != low.dtype:
        raise ValueError(f"'x' is {x.dtype}, its product with a copy in {low.dtype} needs that dtype")
    result: Tensor = _Linear.apply(x, weight, bias, low, low_bias)
    with torch.no_grad():  # after x is kept: a checkpoint's second forward pass ends there, before the product
        flat, out = x.reshape(-1, x.shape[-1]), result.detach().view(-1, len(low))
        if low_bias is None:
            torch.mm(flat, low.t(), out=out)
        else:
            torch.addmm(low_bias, flat, low.t(), out=out)
    return result


class _Linear(torch.autograd.Function):
    """The derivative; its result is empty. A Function keeps its tensors once its ``forward`` has returned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, low_bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, low)
        ctx.weight, ctx.bias_dtype = weight, None if bias is None else bias.dtype
        return x.new_empty((*x.shape[:-1], len(low)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low = ctx.saved_tensors
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        dx = (flat @ low).view(x.shape) if need_x else None
        if need_weight:
            add_gradient(ctx.weight, flat, x.reshape(-1, x.shape[-1]))
        return dx, None, bias_gradient(flat, ctx.bias_dtype) if need_bias else None, None, None


def bias_gradient(dz: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of the rows of ``dz`` (t, m), in ``dtype``; on CUDA it is summed in it, elsewhere it is rounded to that of dz
    first."""
    return dz.sum(0, dtype=dtype if dz.is_cuda else None).to(dtype)


def add_gradient(weight: Tensor, dz: Tensor, x: Tensor) -> None:
    """``accumulate`` into ``weight.grad``, which is made where it is None."""
    first = weight.grad is None
    if weight.grad is None:
        weight.grad = torch.empty_like(weight)
    accumulate(weight.grad, dz, x, first=first)


def accumulate(total: Tensor, dz: Tensor, x: Tensor, *, first: bool) -> None:
    """``total += dz.T @ x`` (``=`` for the ``first``); ``total`` (m, n) is fp32, or fp64 as dz (t, m) and x (t, n).

    On CUDA the products are added in fp32 as they come, in the product's own pass. Elsewhere those in a lower precision are
    rounded once per call.
    """
    if total.dtype == dz.dtype:
        total.addmm_(dz.t(), x, beta=0 if first else 1)
    elif total.is_cuda and first:
        torch.mm(dz.t(), x, out_dtype=total.dtype, out=total)
    elif total.is_cuda:
        torch.addmm(total, dz.t(), x, out_dtype=total.dtype, out=total)
    else:
        rows = max(1, _SLICE // (x.shape[1] * x.element_size()))
        product = x.new_empty((min(rows, len(total)), x.shape[1]))
        for start in range(0, len(total), rows):
            part = total[start : start + rows]
            found = torch.mm(dz[:, start : start + rows].t(), x, out=product[: len(part)])
            part.copy_(found) if first else part.add_(found)
