"""The residual addition and the two LayerNorms of the parallel residual in one pass; after the last layer, with one norm.

x' = x + a + m, y1 = norm(x') w1 + b1, y2 = norm(x') w2 + b2, with norm(x) = (x - mean) / sqrt(variance + eps) over the last
dimension (Ba, Kiros and Hinton 2016, arXiv 1607.06450); the parallel residual is GPT-J's and GPT-NeoX's (arXiv 2204.06745,
section 2.1): a is attention's output and m the MLP's, of the layer before.

Bytes moved, bf16, n elements: forward 12 n (three read, three written), backward 10 n (x', dy1, dy2 and dx' read, dx written),
with 16 bytes for each column and program of partial sums, 20 where it gives biases their gradients: those of the layers that
wrote a and m, which are one and the same sum of dx. Separate additions and norms move 16 a + 6 a (a = 2 n bytes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarewarm_kernels.operators import HAS_TRITON, LAUNCH, check_floats, define, exact, programs, rows_of
from megarewarm_kernels.part_sums import sums_of


def residual_norms(
    x: Tensor,
    attn_out: Tensor | None,
    mlp_out: Tensor | None,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    eps: float = 1e-5,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """(x + attn_out + mlp_out, its first LayerNorm, its second LayerNorm).

    Args:
        x: (..., h), any floating dtype.
        attn_out, mlp_out: like x, or None both for nothing to be added.
        weight1, bias1, weight2, bias2: (h,), the two norms', any floating dtype.
        eps: added to the variance.
        biases: (h,) each, which attn_out and mlp_out hold already but without a derivative: F.linear(x, w, bias.detach()). They
            get their gradients here, the sum of x's over all rows. None: there is none, or it has a derivative.

    Returns:
        Three tensors like x. The sum is computed in fp32 and rounded once; the norms are computed from what was rounded, as
        the next layer reads it. Statistics are fp32. Gradients come in the dtypes of the arguments; the weights' are summed in
        fp32, in the same order at every run. Raises ValueError on wrong shapes or dtypes.
    """
    _check(x, attn_out, mlp_out, (weight1, bias1, weight2, bias2), biases)
    total, first, second = _ResidualNorms.apply(x, attn_out, mlp_out, weight1, bias1, weight2, bias2, eps, *biases)
    return total, first, second


def _check(
    x: Tensor,
    attn_out: Tensor | None,
    mlp_out: Tensor | None,
    norms: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> None:
    for name, part in (("attn_out", attn_out), ("mlp_out", mlp_out)):
        if (part is None) != (attn_out is None) or (part is not None and part.shape != x.shape):
            found = "nothing" if part is None else tuple(part.shape)
            raise ValueError(f"attn_out and mlp_out are like x {tuple(x.shape)} or both None, '{name}' is {found}")
    for part in (*norms, *(bias for bias in biases if bias is not None)):
        if part.shape != x.shape[-1:]:
            raise ValueError(f"weights and biases of the norms are {tuple(x.shape[-1:])}, got {tuple(part.shape)}")
    check_floats(x=x, attn_out=attn_out, mlp_out=mlp_out)
    for names, parts in ((("weight1", "bias1", "weight2", "bias2"), norms), (("biases[0]", "biases[1]"), biases)):
        check_floats(**dict(zip(names, parts, strict=False)))


def reference(
    x: Tensor,
    attn_out: Tensor | None,
    mlp_out: Tensor | None,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor | None = None,
    bias2: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of ``residual_norms`` in plain PyTorch. Without weight2 the last is an empty tensor."""
    kind = exact(x.dtype)
    total = x
    if attn_out is not None and mlp_out is not None:
        total = (x.to(kind) + attn_out + mlp_out).to(x.dtype)
    wide = total.to(kind)
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    second = x.new_empty(0) if weight2 is None or bias2 is None else (normed * weight2 + bias2).to(x.dtype)
    return total, (normed * weight1 + bias1).to(x.dtype), second


def residual_norm(
    x: Tensor,
    attn_out: Tensor | None,
    mlp_out: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """The LayerNorm of x + attn_out + mlp_out alone; arguments and errors as of ``residual_norms``."""
    _check(x, attn_out, mlp_out, (weight, bias), biases)
    result: Tensor = _ResidualNorms.apply(x, attn_out, mlp_out, weight, bias, None, None, eps, *biases)[1]
    return result


class _ResidualNorms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, attn_out: Tensor | None, mlp_out: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        norms, ctx.biases = rest[:5], rest[5:]
        total, first, second, mean, rstd = _forward(x, attn_out, mlp_out, *norms)
        weight1, _, weight2, _, _ = norms
        total = x.view_as(x) if attn_out is None else total
        ctx.added = attn_out is not None
        ctx.save_for_backward(total, weight1, weight2, mean, rstd)
        ctx.set_materialize_grads(False)
        return total, first, second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, residual: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        total, _, weight2, _, _ = saved
        used = (True, weight2 is not None)  # what nobody read has no gradient
        grad1, grad2 = (
            torch.zeros_like(total) if grad is None and there else grad for grad, there in zip(grads, used, strict=True)
        )
        wanted = [bias if needed else None for bias, needed in zip(ctx.biases, ctx.needs_input_grad[8:], strict=True)]
        dx, dw1, db1, dw2, db2, *sums = _backward(residual, grad1, grad2, *saved, *wanted)
        added = dx if ctx.added else None
        given = (found if bias is not None else None for bias, found in zip(wanted, sums, strict=True))
        second = (None, None) if weight2 is None else (dw2, db2)
        return dx, added, added, dw1, db1, *second, None, *given


Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _define_forward(
    x: Tensor,
    attn_out: Tensor | None,
    mlp_out: Tensor | None,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    eps: float,
) -> Five:
    total, first, second = reference(x, attn_out, mlp_out, weight1, bias1, weight2, bias2, eps=eps)
    wide = total.to(exact(x.dtype))
    mean = wide.mean(-1)
    rstd = torch.rsqrt((wide - mean[..., None]).square().mean(-1) + eps)
    added = x.new_empty(0) if attn_out is None else total.contiguous()
    return added, first.contiguous(), second.contiguous(), mean.contiguous(), rstd.contiguous()


def _define_backward(
    residual: Tensor | None,
    grad1: Tensor,
    grad2: Tensor | None,
    total: Tensor,
    weight1: Tensor,
    weight2: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    attn_bias: Tensor | None,
    mlp_bias: Tensor | None,
) -> Seven:
    """Five gradients, and the sum of the first over all rows as that of each bias; an empty tensor for None."""
    kind = exact(total.dtype)
    normed = (total.to(kind) - mean[..., None]) * rstd[..., None]
    wide1, wide2 = grad1.to(kind), None if grad2 is None else grad2.to(kind)
    inner = wide1 * weight1
    if wide2 is not None and weight2 is not None:
        inner = inner + wide2 * weight2
    dx = (inner - normed * (normed * inner).mean(-1, keepdim=True) - inner.mean(-1, keepdim=True)) * rstd[..., None]
    if residual is not None:
        dx = dx + residual
    rows = tuple(range(total.dim() - 1))

    def summed(value: Tensor, like: Tensor) -> Tensor:
        return (value.sum(rows) if rows else value).to(like.dtype, copy=True)

    weights = [summed(wide1 * normed, weight1), summed(wide1, weight1), total.new_empty(0), total.new_empty(0)]
    if wide2 is not None and weight2 is not None:
        weights[2:] = summed(wide2 * normed, weight2), summed(wide2, weight2)
    one, other = (total.new_empty(0) if bias is None else summed(dx, bias) for bias in (attn_bias, mlp_bias))
    return dx.to(total.dtype).contiguous(), weights[0], weights[1], weights[2], weights[3], one, other


def _shape_forward(x: Tensor, attn_out: Tensor | None, *rest: Any) -> Five:
    statistic = x.new_empty(x.shape[:-1], dtype=exact(x.dtype))
    added = x.new_empty(0 if attn_out is None else x.shape)
    second = x.new_empty(0 if rest[3] is None else x.shape)
    return added, x.new_empty(x.shape), second, statistic, torch.empty_like(statistic)


def _shape_backward(
    residual: Tensor | None,
    grad1: Tensor,
    grad2: Tensor | None,
    total: Tensor,
    weight1: Tensor,
    weight2: Tensor | None,
    *rest: Any,
) -> Seven:
    likes = (weight1, weight1, weight2, weight2, *rest[-2:])
    one, two, three, four, five, six = (total.new_empty(0) if like is None else like.new_empty(like.shape) for like in likes)
    return total.new_empty(total.shape), one, two, three, four, five, six


if HAS_TRITON:
    import triton
    import triton.language as tl

    from megarewarm_kernels.operators import PREFETCH

    @triton.jit
    def residual_norms_forward(  # type: ignore[no-untyped-def]
        x_ptr,
        attn_out_ptr,
        mlp_out_ptr,
        weight1_ptr,
        bias1_ptr,
        weight2_ptr,
        bias2_ptr,
        total_ptr,
        first_ptr,
        second_ptr,
        mean_ptr,
        rstd_ptr,
        x_stride,
        attn_out_stride,
        mlp_out_stride,
        columns,
        eps,
        ADDED: tl.constexpr,
        SECOND: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)  # rows x columns may pass 2^31
        column = tl.arange(0, COLUMNS)
        inside = column < columns
        x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        if ADDED:
            x += tl.load(attn_out_ptr + row * attn_out_stride + column, mask=inside, other=0.0).to(tl.float32)
            x += tl.load(mlp_out_ptr + row * mlp_out_stride + column, mask=inside, other=0.0).to(tl.float32)
            rounded = x.to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + row * columns + column, rounded, mask=inside)
            x = rounded.to(tl.float32)
        mean = tl.sum(x, axis=0) / columns
        centred = tl.where(inside, x - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / columns + eps)
        normed = centred * rstd
        weight1 = tl.load(weight1_ptr + column, mask=inside, other=0.0).to(tl.float32)
        bias1 = tl.load(bias1_ptr + column, mask=inside, other=0.0).to(tl.float32)
        if SECOND:  # loads before stores, which they would wait for
            weight2 = tl.load(weight2_ptr + column, mask=inside, other=0.0).to(tl.float32)
            bias2 = tl.load(bias2_ptr + column, mask=inside, other=0.0).to(tl.float32)
        first = (normed * weight1 + bias1).to(first_ptr.dtype.element_ty)
        tl.store(first_ptr + row * columns + column, first, mask=inside)
        if SECOND:
            second = (normed * weight2 + bias2).to(second_ptr.dtype.element_ty)
            tl.store(second_ptr + row * columns + column, second, mask=inside)
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)

    @triton.jit
    def residual_norms_backward(  # type: ignore[no-untyped-def]
        residual_ptr,
        grad1_ptr,
        grad2_ptr,
        total_ptr,
        weight1_ptr,
        weight2_ptr,
        mean_ptr,
        rstd_ptr,
        dx_ptr,
        partial_ptr,
        residual_stride,
        grad1_stride,
        grad2_stride,
        total_stride,
        rows,
        columns,
        each,
        COLUMNS: tl.constexpr,
        RESIDUAL: tl.constexpr,
        SECOND: tl.constexpr,
        SHARED: tl.constexpr,
    ):
        part = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, COLUMNS)
        inside = column < columns
        weight1 = tl.load(weight1_ptr + column, mask=inside, other=0.0).to(tl.float32)
        if SECOND:
            weight2 = tl.load(weight2_ptr + column, mask=inside, other=0.0).to(tl.float32)
        dw1 = tl.zeros((COLUMNS,), tl.float32)
        db1 = tl.zeros((COLUMNS,), tl.float32)
        dw2 = tl.zeros((COLUMNS,), tl.float32)
        db2 = tl.zeros((COLUMNS,), tl.float32)
        shared = tl.zeros((COLUMNS,), tl.float32)
        for row in tl.range(part * each, min(part * each + each, rows), num_stages=PREFETCH):
            x = tl.load(total_ptr + row * total_stride + column, mask=inside, other=0.0).to(tl.float32)
            grad1 = tl.load(grad1_ptr + row * grad1_stride + column, mask=inside, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + row)
            normed = tl.where(inside, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
            inner = grad1 * weight1
            if SECOND:
                grad2 = tl.load(grad2_ptr + row * grad2_stride + column, mask=inside, other=0.0).to(tl.float32)
                inner += grad2 * weight2
                dw2 += grad2 * normed
                db2 += grad2
            along = tl.sum(inner * normed, axis=0) / columns
            level = tl.sum(inner, axis=0) / columns
            dx = (inner - normed * along - level) * rstd
            if RESIDUAL:
                dx += tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
            if SHARED:
                shared += dx  # columns outside are not stored
            tl.store(dx_ptr + row * columns + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            dw1 += grad1 * normed
            db1 += grad1
        # one row of partial sums for each program, added up afterwards: no atomics, so the same result at every run
        base = partial_ptr + part * (2 + 2 * SECOND + SHARED) * columns + column
        tl.store(base, dw1, mask=inside)
        tl.store(base + columns, db1, mask=inside)
        if SECOND:
            tl.store(base + 2 * columns, dw2, mask=inside)
            tl.store(base + 3 * columns, db2, mask=inside)
        if SHARED:
            tl.store(base + (2 + 2 * SECOND) * columns, shared, mask=inside)

    def warps(columns: int) -> int:
        """Warps for a row of so many columns: 8 elements for each thread, which are 16 bytes of bf16, up to 4096 columns."""
        return min(16, max(1, triton.next_power_of_2(columns) // 256))

    def _kernel_forward(x: Tensor, attn_out: Tensor | None, mlp_out: Tensor | None, *norms: Any) -> Five:
        if x.dtype == torch.float64 or x.shape[-1] > _MOST_COLUMNS:
            return _define_forward(x, attn_out, mlp_out, *norms)
        weight1, bias1, weight2, bias2, eps = norms
        parameters = (weight1, bias1, weight1, bias1) if weight2 is None else (weight1, bias1, weight2, bias2)
        flat = rows_of(x)
        rows, columns = flat.shape
        parts = [flat if part is None else rows_of(part) for part in (attn_out, mlp_out)]
        added = torch.empty((0,) if attn_out is None else flat.shape, dtype=x.dtype, device=x.device)
        first = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
        second = torch.empty((0,) if weight2 is None else flat.shape, dtype=x.dtype, device=x.device)
        mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
        if flat.numel():
            residual_norms_forward[(rows,)](
                flat,
                *parts,
                *(part.contiguous() for part in parameters),
                added,
                first,
                second,
                mean,
                rstd,
                flat.stride(0),
                *(part.stride(0) for part in parts),
                columns,
                eps,
                ADDED=attn_out is not None,
                SECOND=weight2 is not None,
                COLUMNS=triton.next_power_of_2(columns),
                num_warps=warps(columns),
                **LAUNCH,
            )
        shaped = added if attn_out is None else added.view(x.shape)
        second = second if weight2 is None else second.view(x.shape)
        return shaped, first.view(x.shape), second, mean.view(x.shape[:-1]), rstd.view(x.shape[:-1])

    def _kernel_backward(*arguments: Any) -> Seven:
        total, weight1, weight2, mean, rstd, *biases = arguments[3:]
        if total.dtype == torch.float64 or total.shape[-1] > _MOST_COLUMNS_BACKWARD:
            return _define_backward(*arguments)
        residual, grad1 = arguments[:2]
        parts = [rows_of(grad1 if part is None else part) for part in arguments[:4]]
        rows, columns = parts[3].shape
        dx = torch.empty((rows, columns), dtype=total.dtype, device=total.device)
        count = programs(rows, total.device) if rows else 0
        likes = [like for like in (weight1, weight1, weight2, weight2, *biases) if like is not None]
        own = 2 if weight2 is None else 4
        partial = torch.empty((count, min(own + 1, len(likes)), columns), dtype=torch.float32, device=total.device)
        if dx.numel():
            residual_norms_backward[(count,)](
                *parts,
                weight1.contiguous(),
                (weight1 if weight2 is None else weight2).contiguous(),
                mean.contiguous(),
                rstd.contiguous(),
                dx,
                partial,
                *(part.stride(0) for part in parts),
                rows,
                columns,
                triton.cdiv(rows, count),
                COLUMNS=triton.next_power_of_2(columns),
                RESIDUAL=residual is not None,
                SECOND=weight2 is not None,
                SHARED=len(likes) > own,
                num_warps=warps(columns),
                **LAUNCH,
            )
        dw1, db1, *rest = sums_of(partial, likes)
        dw2, db2, one, other = (total.new_empty(0) if like is None else rest.pop(0) for like in (weight2, weight2, *biases))
        return dx.view(total.shape), dw1, db1, dw2, db2, one, other

    # A row lies in the registers of one program; backward with the four sums it adds to. More would spill.
    _MOST_COLUMNS, _MOST_COLUMNS_BACKWARD = 8192, 4096
else:
    _kernel_forward = _kernel_backward = None  # type: ignore[assignment]

_forward = define("residual_norms", _define_forward, shapes=_shape_forward, kernel=_kernel_forward)
_backward = define("residual_norms_backward", _define_backward, shapes=_shape_backward, kernel=_kernel_backward)
