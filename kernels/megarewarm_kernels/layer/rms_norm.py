"""The residual addition and RMSNorm in one pass.

x' = x + delta, y = x' / sqrt(mean(x'^2) + eps) w over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4; eps
as in Llama). With r = 1 / sqrt(mean(x'^2) + eps), n = r x' and g = dy w, the gradient is dx' = r (g - n mean(g n)),
to which that of the residual stream is added.

Bytes moved, bf16, n elements: forward 8 n (two read, two written; 4 n without delta), backward 8 n (x', dy and dx' read, dx
written; 6 n where nothing else reads x'), with 4 bytes for each column and program of partial sums. A separate addition, norm
and addition of the two gradients move 6 n + 4 n forward and 6 n + 6 n backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarewarm_kernels.operators import HAS_TRITON, LAUNCH, check_floats, define, exact, programs, rows_of
from megarewarm_kernels.part_sums import sums_of


def residual_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(x + delta, its RMSNorm).

    Args:
        x: (..., h), any floating dtype.
        delta: like x, or None for nothing to be added: the first result is then x itself, not a copy.
        weight: (h,), the same or another floating dtype.
        eps: added to the mean square.

    Returns:
        Two tensors like x. The sum is rounded once; the norm is computed from what was rounded, as the next layer reads it, in
        fp32 (fp64 for fp64), and rounded once. Either result may be left unused. Gradients come in the dtypes of the arguments;
        the weight's is summed in fp32, in the same order at every run. Raises ValueError on wrong shapes or dtypes.
    """
    if delta is not None and delta.shape != x.shape:
        raise ValueError(f"delta is like x {tuple(x.shape)} or None, got {tuple(delta.shape)}")
    if not x.dim() or weight.shape != x.shape[-1:]:
        raise ValueError(f"need x (..., h) and weight (h,), got {tuple(x.shape)} and {tuple(weight.shape)}")
    check_floats(x=x, delta=delta, weight=weight)
    total, normed = _ResidualRmsNorm.apply(x, delta, weight, eps)
    return total, normed


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """The RMSNorm of ``x`` (..., h), as ``residual_rms_norm`` computes it: a tensor like x."""
    return residual_rms_norm(x, None, weight, eps=eps)[1]


def reference(x: Tensor, delta: Tensor | None, weight: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The definition of ``residual_rms_norm`` in plain PyTorch."""
    kind = exact(x.dtype)
    total = x if delta is None else (x.to(kind) + delta).to(x.dtype)
    wide = total.to(kind)
    return total, (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


class _ResidualRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        total, normed, rstd = _forward(x, delta, weight, eps)
        total = x.view_as(x) if delta is None else total
        ctx.added = delta is not None
        ctx.save_for_backward(total, weight, rstd)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, residual: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        dx, dweight = residual, None
        if grad is not None:
            dx, dweight = _backward(residual, grad, *ctx.saved_tensors)
        return dx, dx if ctx.added else None, dweight, None


Three = tuple[Tensor, Tensor, Tensor]


def _define_forward(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Three:
    kind = exact(x.dtype)
    total = x
    if delta is not None:
        total = (x + delta if x.dtype == delta.dtype else (x.to(kind) + delta).to(x.dtype)).contiguous()
    rstd = torch.linalg.vector_norm(total, dim=-1, dtype=kind).square_().div_(x.shape[-1] or 1).add_(eps).rsqrt_()
    normed = torch.mul(total, rstd[..., None]).mul_(weight).to(x.dtype)
    added = x.new_empty(0) if delta is None else total
    return added, normed.contiguous(), rstd.contiguous()


def _define_backward(
    residual: Tensor | None, grad: Tensor, total: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    kind, columns = exact(total.dtype), total.shape[-1]
    flat, wide = (part.reshape(-1, columns).to(kind) for part in (grad, total))
    scale, wide_weight = rstd.reshape(-1), weight.to(kind)
    # both sums are products with a vector of what then takes dx: one temporary in all
    product = flat * wide
    dweight = torch.mv(product.t(), scale)
    along = torch.mv(product, wide_weight).mul_(scale).div_(-columns).mul_(scale)
    dx = torch.mul(flat, wide_weight, out=product).addcmul_(wide, along[:, None]).mul_(scale[:, None])
    if residual is not None:
        dx.add_(residual.reshape(-1, columns))
    return dx.to(total.dtype).contiguous().view(total.shape), dweight.to(weight.dtype)


def _shape_forward(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Three:
    statistic = x.new_empty(x.shape[:-1], dtype=exact(x.dtype))
    return x.new_empty(0 if delta is None else x.shape), x.new_empty(x.shape), statistic


def _shape_backward(
    residual: Tensor | None, grad: Tensor, total: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), weight.new_empty(weight.shape)


if HAS_TRITON:
    import triton
    import triton.language as tl

    from megarewarm_kernels.operators import PREFETCH

    @triton.jit
    def rms_norm_forward(  # type: ignore[no-untyped-def]
        x_ptr,
        delta_ptr,
        weight_ptr,
        total_ptr,
        normed_ptr,
        rstd_ptr,
        x_stride,
        delta_stride,
        columns,
        eps,
        ADDED: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)  # rows x columns may pass 2^31
        column = tl.arange(0, COLUMNS)
        inside = column < columns
        x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        if ADDED:
            x += tl.load(delta_ptr + row * delta_stride + column, mask=inside, other=0.0).to(tl.float32)
            rounded = x.to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + row * columns + column, rounded, mask=inside)
            x = rounded.to(tl.float32)
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / columns + eps)
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(normed_ptr + row * columns + column, (x * rstd * weight).to(normed_ptr.dtype.element_ty), mask=inside)
        tl.store(rstd_ptr + row, rstd)

    @triton.jit
    def rms_norm_backward(  # type: ignore[no-untyped-def]
        residual_ptr,
        grad_ptr,
        total_ptr,
        weight_ptr,
        rstd_ptr,
        dx_ptr,
        partial_ptr,
        residual_stride,
        grad_stride,
        total_stride,
        rows,
        columns,
        each,
        RESIDUAL: tl.constexpr,
        COLUMNS: tl.constexpr,
        PARTS: tl.constexpr,
    ):
        """A program has rows, and COLUMNS of them: PARTS programs share rows that are more than registers hold."""
        part = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < columns
        dweight = tl.zeros((COLUMNS,), tl.float32)
        for row in tl.range(part * each, min(part * each + each, rows), num_stages=PREFETCH):
            rstd = tl.load(rstd_ptr + row)
            along = 0.0
            if PARTS > 1:
                products = tl.zeros((COLUMNS,), tl.float32)
                for other in range(PARTS):
                    some = other * COLUMNS + tl.arange(0, COLUMNS)
                    product = tl.load(total_ptr + row * total_stride + some, mask=some < columns, other=0.0).to(tl.float32)
                    product *= rstd * tl.load(grad_ptr + row * grad_stride + some, mask=some < columns, other=0.0).to(
                        tl.float32
                    )
                    products += product * tl.load(weight_ptr + some, mask=some < columns, other=0.0).to(tl.float32)
                along = tl.sum(products, axis=0) / columns
            normed = tl.load(total_ptr + row * total_stride + column, mask=inside, other=0.0).to(tl.float32) * rstd
            grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
            dweight += grad * normed
            # read for each row, from the cache: registers are for what differs
            inner = grad * tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
            if PARTS == 1:
                along = tl.sum(inner * normed, axis=0) / columns
            dx = (inner - normed * along) * rstd
            if RESIDUAL:
                dx += tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx_ptr + row * columns + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        # one row of partial sums for each program, added up afterwards: no atomics, so the same result at every run
        tl.store(partial_ptr + part * columns + column, dweight, mask=inside)

    def warps(columns: int, each: int = 256) -> int:
        """Warps for a row of so many columns: ``each`` elements for a warp; for a thread, 8 are 16 bytes of bf16."""
        return min(16, max(1, triton.next_power_of_2(columns) // each))

    def _kernel_forward(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Three:
        if x.dtype == torch.float64 or x.shape[-1] > _MOST_COLUMNS:
            return _define_forward(x, delta, weight, eps)
        flat = rows_of(x)
        rows, columns = flat.shape
        other = flat if delta is None else rows_of(delta)
        normed = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
        total = x.new_empty(0) if delta is None else torch.empty_like(normed)
        rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        if normed.numel():
            rms_norm_forward[(rows,)](
                flat,
                other,
                weight.contiguous(),
                total,
                normed,
                rstd,
                flat.stride(0),
                other.stride(0),
                columns,
                eps,
                ADDED=delta is not None,
                COLUMNS=triton.next_power_of_2(columns),
                num_warps=warps(columns),
                **LAUNCH,
            )
        return total if delta is None else total.view(x.shape), normed.view(x.shape), rstd

    def _kernel_backward(
        residual: Tensor | None, grad: Tensor, total: Tensor, weight: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor]:
        if total.dtype == torch.float64:
            return _define_backward(residual, grad, total, weight, rstd)
        flat_grad, flat = rows_of(grad), rows_of(total)
        other = flat_grad if residual is None else rows_of(residual)
        rows, columns = flat.shape
        dx = torch.empty((rows, columns), dtype=total.dtype, device=total.device)
        count = programs(rows, total.device) if rows else 0
        partial = torch.empty((count, 1, columns), dtype=torch.float32, device=total.device)
        if dx.numel():
            width = min(_PART, triton.next_power_of_2(columns))
            parts = triton.cdiv(columns, width)
            rms_norm_backward[(count, parts)](
                other,
                flat_grad,
                flat,
                weight.contiguous(),
                rstd.contiguous(),
                dx,
                partial,
                other.stride(0),
                flat_grad.stride(0),
                flat.stride(0),
                rows,
                columns,
                triton.cdiv(rows, count),
                RESIDUAL=residual is not None,
                COLUMNS=width,
                PARTS=parts,
                num_warps=warps(width, _EACH_BACKWARD),
                **LAUNCH,
            )
        return dx.view(total.shape), sums_of(partial, [weight])[0]

    # chosen so that no registers are spilled: tests/kernel_compile.py
    _MOST_COLUMNS = 16384  # of the forward pass: a row lies in the registers of one program
    _PART, _EACH_BACKWARD = 8192, 512  # columns of a program, and of a warp
else:
    _kernel_forward = _kernel_backward = None  # type: ignore[assignment]

_forward = define("residual_rms_norm", _define_forward, shapes=_shape_forward, kernel=_kernel_forward)
_backward = define("residual_rms_norm_backward", _define_backward, shapes=_shape_backward, kernel=_kernel_backward)
