"""An MLP of two linear layers with a GELU between them, whose passes over its middle are part of the products (cuBLASLt).

y = gelu(z) W2' + b2 with z = x W1' + b1 and the tanh approximation of GELU (see bias_gelu.py). The first product writes z and
gelu(z). Backward, dz = (dy W2) * gelu'(z) and the sum of its rows, the gradient of b1, come out of one product.

Bytes moved between the products, bf16, n elements of the middle: forward 2 n (z written beside gelu(z)), backward 2 n (z read).
``bias_gelu`` moves 4 n and 6 n.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megarewarm_kernels.layer import cublaslt
from megarewarm_kernels.operators import check_floats, define, exact
from megarewarm_kernels.products import add_gradient, bias_gradient


class LowLayer(NamedTuple):
    """A linear layer of ``weight`` (o, i) and ``bias`` (o,), leaves in fp32, and copies of both, rounded to the dtype of
    products. A ``bias`` that is detached gets no gradient."""

    weight: Tensor
    bias: Tensor
    low: Tensor
    low_bias: Tensor


def gelu_products(x: Tensor, first: LowLayer, second: LowLayer, *, keep: bool = True) -> Tensor:
    """``gelu(x @ first.low.T + first.low_bias) @ second.low.T + second.low_bias``, by cuBLASLt on CUDA where
    ``cublaslt.objection`` has none, else by PyTorch.

    Args:
        x: (..., h) in the dtype of the copies.
        first, second: f times h and o times f.
        keep: keep gelu(z) for the backward pass; else it is computed again from z, rounded to the dtype of x.

    Returns:
        (..., o) in that dtype. Gradients are as those of ``products.linear``; the product that sums the first bias's rounds it
        once to the dtype of x. Raises ValueError on wrong shapes or dtypes.
    """
    check_floats(x=x)
    if len({x.dtype, *(part.dtype for layer in (first, second) for part in layer[2:])}) > 1:
        raise ValueError(f"'x' is {x.dtype}, its products need copies of that dtype")
    width, middle = x.shape[-1], len(first.low)
    if first.low.shape != (middle, width) or second.low.dim() != 2 or second.low.shape[1] != middle:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, first.low, second.low))
        raise ValueError(f"need x (..., h), weights (f, h) and (o, f), got {shapes}")
    result, active = _GeluProducts.apply(x, keep, *first, *second[:3])
    # once what is kept has been: a checkpoint's second forward pass ends there, before this product
    torch.addmm(second.low_bias, active, second.low.t(), out=result.detach().view(-1, len(second.low)))
    return result


class _GeluProducts(torch.autograd.Function):
    """The derivative; its result is empty. A Function keeps its tensors once its ``forward`` has returned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: bool, *parts: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias, low, low_bias, weight2, bias2, low2 = parts
        active, before = _forward(x.reshape(-1, x.shape[-1]), low, low_bias)
        ctx.save_for_backward(x, low, low2, before, active if keep else None)
        ctx.weights, ctx.dtypes = (weight, weight2), (bias.dtype, bias2.dtype)
        ctx.mark_non_differentiable(active)
        ctx.set_materialize_grads(False)
        return x.new_empty((*x.shape[:-1], len(low2))), active

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        x, low, low2, before, active = ctx.saved_tensors
        if grad is None:
            return (None,) * 9
        need_x, _, need_weight, need_bias, _, _, need_weight2, need_bias2, _ = ctx.needs_input_grad
        flat, dy = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        if need_weight2:
            add_gradient(ctx.weights[1], dy, F.gelu(before, approximate="tanh") if active is None else active)
        db2 = bias_gradient(dy, ctx.dtypes[1]) if need_bias2 else None
        dx = db = None
        if need_x or need_weight or need_bias:
            dz, sums = _backward(dy, low2, before)
            db = sums.to(ctx.dtypes[0]) if need_bias else None
            if need_weight:
                add_gradient(ctx.weights[0], dz, flat)
            dx = (dz @ low).view(x.shape) if need_x else None
        return dx, None, None, db, None, None, None, db2, None


def _multiply(x: Tensor, weight: Tensor, results: tuple[Tensor, Tensor, Tensor], epilogue: int) -> bool:
    """Fill ``results``, the product, its bias and its aux, by cuBLASLt, and say whether that was possible."""
    lt = cublaslt.loaded() if len(x) and not cublaslt.objection(x.device, x.dtype, *weight.shape) else None
    if lt is None:
        return False
    with torch.cuda.device(x.device):
        handle, stream = torch.cuda.current_blas_handle(), torch.cuda.current_stream().cuda_stream
        lt.multiply(x.contiguous(), weight.contiguous(), *results, epilogue=epilogue, handle=handle, stream=stream)
    return True


def _define_forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    active, before = _shape_forward(x, weight, bias)
    if not _multiply(x, weight, (active, bias, before), cublaslt.GELU_AUX_BIAS):
        torch.addmm(bias, x, weight.t(), out=before)
        active = F.gelu(before, approximate="tanh")
    return active, before


def _define_backward(grad: Tensor, weight: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    dz, db = _shape_backward(grad, weight, before)
    if not _multiply(grad, weight, (dz, db, before), cublaslt.DGELU_BGRAD):
        dz = torch.ops.aten.gelu_backward(grad @ weight, before, approximate="tanh")
        db = dz.sum(0, dtype=exact(dz.dtype)).to(dz.dtype)
    return dz, db


def _shape_forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty((len(x), len(weight))), x.new_empty((len(x), len(weight)))


def _shape_backward(grad: Tensor, weight: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    return grad.new_empty(before.shape), grad.new_empty(before.shape[1])


_forward = define("gelu_product", _define_forward, shapes=_shape_forward)
_backward = define("gelu_product_backward", _define_backward, shapes=_shape_backward)
