"""Linear layers of weights that are kept in fp32 and multiplied in a lower dtype: the copy is given, not made at every call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, low_bias: Tensor | None) -> Tensor:
    """``x @ low.T + low_bias`` with the gradients of ``weight`` and ``bias``, of which ``low`` and ``low_bias`` are copies.

    Args:
        x: (..., h) in the dtype of ``low``.
        weight: (o, h), a leaf, fp32. bias: (o,) or None.
        low, low_bias: the same numbers, rounded to the dtype of the products.

    Returns:
        (..., o) in the dtype of ``low``. The gradient of x has that dtype, those of ``weight`` and ``bias`` have theirs; on
        CUDA the bias's is summed in fp32 to its end, elsewhere it is rounded once as autocast does. Raises ValueError for an x
        of another dtype.
    """
    if x.dtype != low.dtype:
        raise ValueError(f"'x' is {x.dtype}, its product with a copy in {low.dtype} needs that dtype")
    result: Tensor = _Linear.apply(x, weight, bias, low, low_bias)
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, low_bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, low)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, low, low_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low = ctx.saved_tensors
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        dx = (flat @ low).view(x.shape) if need_x else None
        dw = flat.t() @ x.reshape(-1, x.shape[-1]) if need_weight else None
        db = None
        if need_bias:
            db = flat.sum(0, dtype=ctx.bias_dtype if flat.is_cuda else None).to(ctx.bias_dtype)
        return dx, dw, db, None, None
