"""RMSNorm of each query and key head, on the fused projection of queries, keys and values in one pass.

q' = q / sqrt(mean(q^2) + eps) w_q over the channels of a head, and the same for keys with w_k, before the rotary positions:
Qwen3's (arXiv 2505.09388, section 2; with LayerNorm first by Dehghani et al. 2023, arXiv 2302.05442). The derivative is
RMSNorm's (layer/rms_norm.py).

Bytes moved, bf16, k key heads of d with ``group`` queries each, for each token: forward 4 k (group + 2) d (read and written)
and 4 k (group + 1) of statistics, backward 6 k (group + 2) d and as many statistics, with 8 d of partial sums for a program.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarewarm_kernels.operators import HAS_TRITON, LAUNCH, check_floats, define, exact, programs, rows_of
from megarewarm_kernels.part_sums import sums_of

_ELEMENTS = 1024  # of a tile: 8 for each thread, 16 bytes of bf16
_ELEMENTS_BACKWARD = 2048
_WARPS = 4
_MOST_CHANNELS = 1024


def norm_heads(
    qkv: Tensor, query_weight: Tensor, key_weight: Tensor, *, head_dim: int, group: int = 1, eps: float = 1e-6
) -> Tensor:
    """Norm queries and keys, each head by itself, in fp32 (fp64 for fp64), rounded once; copy the values.

    Args:
        qkv: (..., k x (group + 2) x d), any floating dtype: key head by key head its queries, its key and its value.
        query_weight, key_weight: (d,), the same or another floating dtype.
        head_dim: d.
        group: queries of each key head.
        eps: added to the mean square.

    Returns:
        A new tensor like qkv, which nothing here keeps: it may be rotated in place. The backward pass keeps qkv. Gradients come
        in the dtypes of the arguments; the weights' are summed in fp32, in the same order at every run. Raises ValueError on
        wrong shapes or dtypes.
    """
    check(qkv, head_dim, group)
    for name, weight in (("query_weight", query_weight), ("key_weight", key_weight)):
        if weight.shape != (head_dim,):
            raise ValueError(f"'{name}' is ({head_dim},), got {tuple(weight.shape)}")
    check_floats(qkv=qkv, query_weight=query_weight, key_weight=key_weight)
    result: Tensor = _NormHeads.apply(qkv, query_weight, key_weight, head_dim, group, eps)
    return result


def reference(
    qkv: Tensor, query_weight: Tensor, key_weight: Tensor, *, head_dim: int, group: int = 1, eps: float = 1e-6
) -> Tensor:
    """The definition of ``norm_heads`` in plain PyTorch."""
    wide = apart(qkv, head_dim, group).to(exact(qkv.dtype))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    parts = [normed[..., :group, :] * query_weight, normed[..., group : group + 1, :] * key_weight, wide[..., group + 1 :, :]]
    return torch.cat(parts, -2).to(qkv.dtype).view(qkv.shape)


def check(qkv: Tensor, head_dim: int, group: int) -> None:
    """Raise ValueError unless ``qkv`` is (..., k x (group + 2) x d)."""
    if not qkv.dim() or head_dim < 1 or group < 1 or qkv.shape[-1] % ((group + 2) * head_dim):
        raise ValueError(f"need qkv (..., heads x {group + 2} x {head_dim}), got {tuple(qkv.shape)}")


def apart(qkv: Tensor, head_dim: int, group: int) -> Tensor:
    """(..., k x (group + 2) x d) as (..., k, group + 2, d)."""
    return qkv.reshape(*qkv.shape[:-1], qkv.shape[-1] // ((group + 2) * head_dim), group + 2, head_dim)


class _NormHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, query_weight: Tensor, key_weight: Tensor, head_dim: int, group: int, eps: float
    ) -> Tensor:
        out, rstd = _forward(qkv, query_weight, key_weight, head_dim, group, eps)
        ctx.save_for_backward(qkv, query_weight, key_weight, rstd)
        ctx.head_dim, ctx.group = head_dim, group
        result: Tensor = out
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(grad, *ctx.saved_tensors, ctx.head_dim, ctx.group), None, None, None


Three = tuple[Tensor, Tensor, Tensor]


def _weights(query_weight: Tensor, key_weight: Tensor, group: int, kind: torch.dtype) -> Tensor:
    """(group + 1, d): what each query and the key of a key head are scaled by."""
    return torch.cat([query_weight.to(kind).expand(group, -1), key_weight.to(kind)[None]])


def _define_forward(
    qkv: Tensor, query_weight: Tensor, key_weight: Tensor, head_dim: int, group: int, eps: float
) -> tuple[Tensor, Tensor]:
    kind, heads = exact(qkv.dtype), apart(qkv, head_dim, group)
    normed = heads[..., : group + 1, :]
    rstd = torch.linalg.vector_norm(normed, dim=-1, dtype=kind).square_().div_(head_dim).add_(eps).rsqrt_()
    out = torch.empty_like(heads, memory_format=torch.contiguous_format)
    out[..., : group + 1, :] = (normed * rstd[..., None]).mul_(_weights(query_weight, key_weight, group, kind))
    out[..., group + 1, :] = heads[..., group + 1, :]
    return out.view(qkv.shape), rstd.contiguous()


def _define_backward(
    grad: Tensor, qkv: Tensor, query_weight: Tensor, key_weight: Tensor, rstd: Tensor, head_dim: int, group: int
) -> Three:
    kind, heads = exact(qkv.dtype), apart(grad, head_dim, group)
    scale, weights = rstd[..., None], _weights(query_weight, key_weight, group, kind)
    normed = apart(qkv, head_dim, group)[..., : group + 1, :] * scale
    wide = heads[..., : group + 1, :].to(kind)
    product = wide * normed
    dweights = product.reshape(-1, *weights.shape).sum(0)
    along = product.mul_(weights).mean(-1, keepdim=True)
    dqkv = torch.empty(heads.shape, dtype=qkv.dtype, device=qkv.device)
    dqkv[..., : group + 1, :] = torch.mul(wide, weights, out=product).sub_(normed.mul_(along)).mul_(scale)
    dqkv[..., group + 1, :] = heads[..., group + 1, :]
    return dqkv.view(qkv.shape), dweights[:group].sum(0).to(query_weight.dtype), dweights[group].to(key_weight.dtype, copy=True)


def _shape_forward(
    qkv: Tensor, query_weight: Tensor, key_weight: Tensor, head_dim: int, group: int, eps: float
) -> tuple[Tensor, Tensor]:
    statistics = (*qkv.shape[:-1], qkv.shape[-1] // ((group + 2) * head_dim), group + 1)
    return qkv.new_empty(qkv.shape), qkv.new_empty(statistics, dtype=exact(qkv.dtype))


def _shape_backward(
    grad: Tensor, qkv: Tensor, query_weight: Tensor, key_weight: Tensor, rstd: Tensor, head_dim: int, group: int
) -> Three:
    return qkv.new_empty(qkv.shape), query_weight.new_empty(head_dim), key_weight.new_empty(head_dim)


if HAS_TRITON:
    import triton
    import triton.language as tl

    from megarewarm_kernels.operators import PREFETCH

    @triton.jit
    def head_norms_forward(  # type: ignore[no-untyped-def]
        qkv_ptr,
        query_weight_ptr,
        key_weight_ptr,
        out_ptr,
        rstd_ptr,
        vectors,
        heads,
        stride,
        eps,
        D: tl.constexpr,
        GROUP: tl.constexpr,
        WIDTH: tl.constexpr,
        VECTORS: tl.constexpr,
    ):
        """``vectors``: queries, keys and values of all tokens. ``heads``: key heads. ``stride``: of the tokens of qkv."""
        vector = tl.program_id(0) * VECTORS + tl.arange(0, VECTORS)
        channel = tl.arange(0, WIDTH)
        inside = (vector < vectors)[:, None] & (channel < D)[None, :]
        row = heads * (GROUP + 2)
        member = vector % (GROUP + 2)  # of a key head
        # offsets may pass 2^31
        place = (vector // row).to(tl.int64) * stride + vector % row * D
        x = tl.load(qkv_ptr + place[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        query_weight = tl.load(query_weight_ptr + channel, mask=channel < D, other=0.0).to(tl.float32)
        key_weight = tl.load(key_weight_ptr + channel, mask=channel < D, other=0.0).to(tl.float32)
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps)
        weight = tl.where((member == GROUP)[:, None], key_weight[None, :], query_weight[None, :])
        y = tl.where((member > GROUP)[:, None], x, x * rstd[:, None] * weight)
        to = out_ptr + vector.to(tl.int64)[:, None] * D + channel[None, :]
        tl.store(to, y.to(out_ptr.dtype.element_ty), mask=inside)
        statistic = vector // (GROUP + 2) * (GROUP + 1) + member
        tl.store(rstd_ptr + statistic, rstd, mask=(vector < vectors) & (member <= GROUP))

    @triton.jit
    def head_norms_backward(  # type: ignore[no-untyped-def]
        grad_ptr,
        qkv_ptr,
        query_weight_ptr,
        key_weight_ptr,
        rstd_ptr,
        dqkv_ptr,
        partial_ptr,
        vectors,
        heads,
        grad_stride,
        stride,
        each,
        D: tl.constexpr,
        GROUP: tl.constexpr,
        WIDTH: tl.constexpr,
        VECTORS: tl.constexpr,
    ):
        """``each``: tiles of VECTORS that a program walks along."""
        part = tl.program_id(0)
        channel = tl.arange(0, WIDTH)
        query_weight = tl.load(query_weight_ptr + channel, mask=channel < D, other=0.0).to(tl.float32)
        key_weight = tl.load(key_weight_ptr + channel, mask=channel < D, other=0.0).to(tl.float32)
        dquery = tl.zeros((WIDTH,), tl.float32)
        dkey = tl.zeros((WIDTH,), tl.float32)
        row = heads * (GROUP + 2)
        for tile in tl.range(part * each, min(part * each + each, tl.cdiv(vectors, VECTORS)), num_stages=PREFETCH):
            vector = tile * VECTORS + tl.arange(0, VECTORS)
            inside = (vector < vectors)[:, None] & (channel < D)[None, :]
            member = vector % (GROUP + 2)
            token = (vector // row).to(tl.int64)
            within = vector % row * D
            at = qkv_ptr + (token * stride + within)[:, None] + channel[None, :]
            x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            at = grad_ptr + (token * grad_stride + within)[:, None] + channel[None, :]
            grad = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            statistic = vector // (GROUP + 2) * (GROUP + 1) + member
            rstd = tl.load(rstd_ptr + statistic, mask=(vector < vectors) & (member <= GROUP), other=0.0)
            normed = x * rstd[:, None]
            product = grad * normed  # 0 for values
            dquery += tl.sum(tl.where((member < GROUP)[:, None], product, 0.0), axis=0)
            dkey += tl.sum(tl.where((member == GROUP)[:, None], product, 0.0), axis=0)
            weight = tl.where((member == GROUP)[:, None], key_weight[None, :], query_weight[None, :])
            along = tl.sum(product * weight, axis=1) / D
            dx = (grad * weight - normed * along[:, None]) * rstd[:, None]
            dx = tl.where((member > GROUP)[:, None], grad, dx)
            to = dqkv_ptr + vector.to(tl.int64)[:, None] * D + channel[None, :]
            tl.store(to, dx.to(dqkv_ptr.dtype.element_ty), mask=inside)
        # one row of partial sums for each program, added up afterwards: no atomics, so the same result at every run
        base = partial_ptr + part * 2 * D + channel
        tl.store(base, dquery, mask=channel < D)
        tl.store(base + D, dkey, mask=channel < D)

    def _kernel_forward(
        qkv: Tensor, query_weight: Tensor, key_weight: Tensor, head_dim: int, group: int, eps: float
    ) -> tuple[Tensor, Tensor]:
        vectors = qkv.numel() // head_dim
        if qkv.dtype == torch.float64 or head_dim > _MOST_CHANNELS or vectors >= 2**31 - _ELEMENTS:
            return _define_forward(qkv, query_weight, key_weight, head_dim, group, eps)
        out, rstd = _shape_forward(qkv, query_weight, key_weight, head_dim, group, eps)
        if vectors:
            flat, width = rows_of(qkv), triton.next_power_of_2(head_dim)
            tile = _ELEMENTS // width
            head_norms_forward[(triton.cdiv(vectors, tile),)](
                flat,
                query_weight.contiguous(),
                key_weight.contiguous(),
                out,
                rstd,
                vectors,
                flat.shape[1] // ((group + 2) * head_dim),
                flat.stride(0),
                eps,
                D=head_dim,
                GROUP=group,
                WIDTH=width,
                VECTORS=tile,
                num_warps=_WARPS,
                **LAUNCH,
            )
        return out, rstd

    def _kernel_backward(
        grad: Tensor, qkv: Tensor, query_weight: Tensor, key_weight: Tensor, rstd: Tensor, head_dim: int, group: int
    ) -> Three:
        vectors = qkv.numel() // head_dim
        if qkv.dtype == torch.float64 or head_dim > _MOST_CHANNELS or vectors >= 2**31 - _ELEMENTS_BACKWARD:
            return _define_backward(grad, qkv, query_weight, key_weight, rstd, head_dim, group)
        dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        width = triton.next_power_of_2(head_dim)
        tile = _ELEMENTS_BACKWARD // width
        count = programs(triton.cdiv(vectors, tile), qkv.device) if vectors else 0
        partial = torch.empty((count, 2, head_dim), dtype=torch.float32, device=qkv.device)
        if vectors:
            flat_grad, flat = rows_of(grad), rows_of(qkv)
            head_norms_backward[(count,)](
                flat_grad,
                flat,
                query_weight.contiguous(),
                key_weight.contiguous(),
                rstd.contiguous(),
                dqkv,
                partial,
                vectors,
                flat.shape[1] // ((group + 2) * head_dim),
                flat_grad.stride(0),
                flat.stride(0),
                triton.cdiv(triton.cdiv(vectors, tile), count),
                D=head_dim,
                GROUP=group,
                WIDTH=width,
                VECTORS=tile,
                num_warps=_WARPS,
                **LAUNCH,
            )
        dquery, dkey = sums_of(partial, [query_weight, key_weight])
        return dqkv, dquery, dkey
else:
    _kernel_forward = _kernel_backward = None  # type: ignore[assignment]

_forward = define("norm_heads", _define_forward, shapes=_shape_forward, kernel=_kernel_forward)
_backward = define("norm_heads_backward", _define_backward, shapes=_shape_backward, kernel=_kernel_backward)
