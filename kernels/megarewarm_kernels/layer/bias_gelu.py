"""Bias and GELU in one pass, with the gradient of the bias.

y = gelu(x + b), with gelu(z) = z Phi(z) (Hendrycks and Gimpel 2016, arXiv 1606.08415, eq. 1) or its tanh approximation
z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2 (section 2 there).

Bytes moved, bf16, n elements: forward 4 n (x read, y written), backward 6 n (x and dy read, dx written), and the partial
sums of the bias gradient, 4 bytes for each column and program. Separate bias, GELU and column sum move 8 n + 8 n.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megarewarm_kernels.operators import HAS_TRITON, LAUNCH, check_floats, define, exact, rows_of
from megarewarm_kernels.part_sums import sums_of

FORMS = ("none", "tanh")

_ROWS = 16  # of a tile
_COLUMNS = 256
_TILES = 8  # of rows that one program walks down


def bias_gelu(x: Tensor, bias: Tensor, *, approximate: str = "none") -> Tensor:
    """``gelu(x + bias)``, computed in fp32 and rounded once.

    Args:
        x: (..., f), any floating dtype.
        bias: (f,), the same or another floating dtype.
        approximate: "none" for the exact GELU, "tanh" for its approximation.

    Returns:
        (..., f) in x's dtype. Gradients come in the dtypes of x and bias; the bias's is summed in fp32, in the same order at
        every run. Raises ValueError on wrong shapes or dtypes or another form.
    """
    if bias.dim() != 1 or x.shape[-1:] != bias.shape:
        raise ValueError(f"need x (..., f) and bias (f,), got {tuple(x.shape)} and {tuple(bias.shape)}")
    if approximate not in FORMS:
        raise ValueError(f"approximate is 'none' or 'tanh', not '{approximate}'")
    check_floats(x=x, bias=bias)
    result: Tensor = _BiasGelu.apply(x, bias, approximate == "tanh")
    return result


def reference(x: Tensor, bias: Tensor, *, approximate: str = "none") -> Tensor:
    """The definition of ``bias_gelu`` in plain PyTorch."""
    z = x.to(exact(x.dtype)) + bias
    return F.gelu(z, approximate=approximate).to(x.dtype)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, tanh: bool) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.tanh = tanh
        result: Tensor = _forward(x, bias, tanh)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        dx, db = _backward(grad, x, bias, ctx.tanh)
        return dx, db, None


def _define_forward(x: Tensor, bias: Tensor, tanh: bool) -> Tensor:
    return reference(x, bias, approximate="tanh" if tanh else "none").contiguous()


def _define_backward(grad: Tensor, x: Tensor, bias: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    z = x.to(exact(x.dtype)) + bias
    dz = torch.ops.aten.gelu_backward(grad.to(z.dtype), z, approximate="tanh" if tanh else "none")
    db = dz.flatten(0, -2).sum(0) if dz.dim() > 1 else dz
    return dz.to(x.dtype).contiguous(), db.to(bias.dtype, copy=True)


def _shape_forward(x: Tensor, bias: Tensor, tanh: bool) -> Tensor:
    return x.new_empty(x.shape)


def _shape_backward(grad: Tensor, x: Tensor, bias: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


if HAS_TRITON:
    import triton
    import triton.language as tl

    from megarewarm_kernels.operators import PREFETCH

    @triton.jit
    def gelu_parts(z, TANH: tl.constexpr):  # type: ignore[no-untyped-def]
        """(the factor of z in gelu(z), the derivative of gelu at z), z fp32."""
        if TANH:
            # u = sqrt(2 / pi) (z + 0.044715 z^3); tanh(u) = 2 sigmoid(2 u) - 1, so (1 + tanh(u)) / 2 = sigmoid(2 u)
            square = z * z
            factor = 1.0 / (1.0 + tl.exp2(z * (-2.302208198144325 - 0.1029432395800235 * square)))
            derivative = factor + factor * (1.0 - factor) * z * (1.5957691216057308 + 0.21406444881780076 * square)
        else:
            factor = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
            derivative = factor + z * 0.3989422804014327 * tl.exp2(-0.7213475204444817 * z * z)
        return factor, derivative

    @triton.jit
    def bias_gelu_forward(  # type: ignore[no-untyped-def]
        x_ptr, bias_ptr, y_ptr, rows, columns, x_stride, TANH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
        z = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32) + bias[None, :]
        factor, _ = gelu_parts(z, TANH)
        tl.store(y_ptr + row[:, None] * columns + column[None, :], (z * factor).to(y_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def bias_gelu_backward(  # type: ignore[no-untyped-def]
        grad_ptr,
        x_ptr,
        bias_ptr,
        dx_ptr,
        partial_ptr,
        rows,
        columns,
        grad_stride,
        x_stride,
        TANH: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        TILES: tl.constexpr,
    ):
        part = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
        total = tl.zeros((COLUMNS,), tl.float32)
        for tile in tl.range(TILES, num_stages=PREFETCH):
            row = (part * TILES + tile) * ROWS + tl.arange(0, ROWS)
            inside = (row < rows)[:, None] & (column < columns)[None, :]
            z = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + row[:, None] * grad_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
            _, derivative = gelu_parts(z + bias[None, :], TANH)
            dz = grad * derivative
            tl.store(dx_ptr + row[:, None] * columns + column[None, :], dz.to(dx_ptr.dtype.element_ty), mask=inside)
            total += tl.sum(dz, axis=0)  # rows outside have a gradient of 0
        # one row of partial sums for each program, added up afterwards: no atomics, so the same result at every run
        tl.store(partial_ptr + part * columns + column, total, mask=column < columns)

    def _kernel_forward(x: Tensor, bias: Tensor, tanh: bool) -> Tensor:
        if x.dtype == torch.float64:
            return _define_forward(x, bias, tanh)
        flat = rows_of(x)
        y = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
        if flat.numel():
            grid = (triton.cdiv(flat.shape[0], _ROWS), triton.cdiv(flat.shape[1], _COLUMNS))
            bias_gelu_forward[grid](
                flat,
                bias.contiguous(),
                y,
                *flat.shape,
                flat.stride(0),
                TANH=tanh,
                ROWS=_ROWS,
                COLUMNS=_COLUMNS,
                num_warps=4,
                **LAUNCH,
            )
        return y.view(x.shape)

    def _kernel_backward(grad: Tensor, x: Tensor, bias: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
        if x.dtype == torch.float64:
            return _define_backward(grad, x, bias, tanh)
        flat, flat_grad = rows_of(x), rows_of(grad)
        dx = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
        parts = triton.cdiv(flat.shape[0], _ROWS * _TILES)
        partial = torch.empty((parts, 1, flat.shape[1]), dtype=torch.float32, device=x.device)
        if flat.numel():
            grid = (parts, triton.cdiv(flat.shape[1], _COLUMNS))
            bias_gelu_backward[grid](
                flat_grad,
                flat,
                bias.contiguous(),
                dx,
                partial,
                *flat.shape,
                flat_grad.stride(0),
                flat.stride(0),
                TANH=tanh,
                ROWS=_ROWS,
                COLUMNS=_COLUMNS,
                TILES=_TILES,
                num_warps=4,
                **LAUNCH,
            )
        return dx.view(x.shape), sums_of(partial, [bias])[0]
else:
    _kernel_forward = _kernel_backward = None  # type: ignore[assignment]

_forward = define("bias_gelu", _define_forward, shapes=_shape_forward, kernel=_kernel_forward)
_backward = define("bias_gelu_backward", _define_backward, shapes=_shape_backward, kernel=_kernel_backward)
