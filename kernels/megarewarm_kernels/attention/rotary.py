"""Rotary positions on the fused projection of queries, keys and values, in place.

Channels (i, i + r / 2) of a query or key are a point in a plane, which is rotated by its position's angle (Su et al. 2021,
arXiv 2104.09864, section 3.2.2, with the planes of GPT-NeoX: halves, not neighbours). Channels from r on stay as they are.
The derivative turns back: (cos, sin) become (cos, -sin).

The projection holds, key head by key head, its ``group`` queries, its key and its value (grouped queries: Ainslie et al. 2023,
arXiv 2305.13245; a group of 1 is multi-head attention).

Bytes moved, bf16, k key heads: 4 k (group + 1) r for each token and direction (r channels of each query and key, read and
written), and the tables, 4 r for each of their rows. Of the 2 k (group + 2) d bytes of a token no others are touched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarewarm_kernels.operators import HAS_TRITON, LAUNCH, check_floats, define, exact

_ELEMENTS = 1024  # of a program: 8 for each thread, 16 bytes of bf16
_WARPS = 4


def rotate_(
    qkv: Tensor, cos: Tensor, sin: Tensor, *, head_dim: int, group: int = 1, overwrite_gradient: bool = False
) -> Tensor:
    """Rotate queries and keys by their positions, in place. Computed in fp32 (fp64 for fp64) and rounded once.

    Args:
        qkv: (t, k x (group + 2) x d), contiguous, any floating dtype: key head by key head its queries, its key and its value.
            Nobody may have saved it: a projection's output is right, for its derivative does not need it.
        cos, sin: (rows, r / 2), fp32 (fp64 for fp64), r <= d even, r = 0 rotates nothing. Token i takes row i mod rows: one row
            for each position of a sequence, or one for each token. They get no gradients.
        head_dim: d.
        group: queries of each key head.
        overwrite_gradient: the gradient that comes back is nobody else's either, so it may be rotated in place. True
            where what follows splits qkv; wrong where qkv is, say, added to something, which hands its gradient to both.

    Returns:
        qkv. Raises ValueError on wrong shapes or dtypes.
    """
    check(qkv, cos, sin, head_dim, group)
    if not qkv.is_contiguous():
        raise ValueError("qkv is rotated in place and must be contiguous")
    if not cos.shape[1]:
        return qkv
    result: Tensor = _Rotate.apply(qkv, cos, sin, head_dim, group, overwrite_gradient)
    return result


def reference(qkv: Tensor, cos: Tensor, sin: Tensor, *, head_dim: int, group: int = 1) -> Tensor:
    """The definition of ``rotate_`` in plain PyTorch, which leaves ``qkv`` alone."""
    rows, half = cos.shape
    if not qkv.numel():
        return qkv.clone()
    heads = qkv.view(-1, rows, qkv.shape[1] // ((group + 2) * head_dim), group + 2, head_dim)
    query_key = heads[..., : group + 1, :].to(exact(qkv.dtype))
    first, second, rest = query_key.split([half, half, head_dim - 2 * half], -1)
    cos, sin = cos[:, None, None], sin[:, None, None]
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1).to(qkv.dtype)
    return torch.cat([rotated, heads[..., group + 1 :, :]], -2).view(qkv.shape)


def check(qkv: Tensor, cos: Tensor, sin: Tensor, head_dim: int, group: int) -> None:
    """Raise ValueError unless ``qkv`` (t, k x (group + 2) x d) can be rotated by ``cos`` and ``sin`` (rows, r / 2)."""
    if qkv.dim() != 2 or head_dim < 1 or group < 1 or qkv.shape[1] % ((group + 2) * head_dim):
        raise ValueError(f"need qkv (t, heads x {group + 2} x {head_dim}), got {tuple(qkv.shape)}")
    if cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > head_dim:
        limit = f"two equal tables (rows, at most {head_dim // 2})"
        raise ValueError(f"cos and sin are {limit}, got {tuple(cos.shape)} and {tuple(sin.shape)}")
    if qkv.shape[0] and (not cos.shape[0] or qkv.shape[0] % cos.shape[0]):
        raise ValueError(f"{qkv.shape[0]} tokens are no multiple of the {cos.shape[0]} rows of cos and sin")
    check_floats(qkv=qkv)
    kind = exact(qkv.dtype)
    if cos.dtype != kind or sin.dtype != kind:
        raise ValueError(f"for qkv in {qkv.dtype}, cos and sin are in {kind}, got {cos.dtype} and {sin.dtype}")


def consume(qkv: Tensor, cos: Tensor, sin: Tensor, head_dim: int, group: int) -> None:
    """Rotate (..., k x (group + 2) x d) within an autograd Function that returns other tensors, so marks nothing as dirty.
    Autograd raises an error for saved copies of qkv, as of selective checkpointing."""
    if cos.shape[1]:
        apply_rotary(qkv.view(-1, qkv.shape[-1]), cos, sin, head_dim, group, False)
        if not torch.compiler.is_compiling() and not qkv.is_inference():  # a compiler sees the change by itself
            torch.autograd.graph.increment_version(qkv)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, head_dim: int, group: int, overwrite: bool) -> Tensor:
        apply_rotary(qkv, cos, sin, head_dim, group, False)
        ctx.mark_dirty(qkv)
        ctx.save_for_backward(cos, sin)
        ctx.head_dim, ctx.group, ctx.overwrite = head_dim, group, overwrite
        return qkv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.contiguous() if ctx.overwrite else grad.clone(memory_format=torch.contiguous_format)
        apply_rotary(grad, *ctx.saved_tensors, ctx.head_dim, ctx.group, True)
        return grad, None, None, None, None, None


def _define(qkv: Tensor, cos: Tensor, sin: Tensor, head_dim: int, group: int, back: bool) -> None:
    (rows, half), heads = cos.shape, qkv.shape[1] // ((group + 2) * head_dim)
    if not qkv.numel() or not half:
        return
    rotated = qkv.view(-1, rows, heads, group + 2, head_dim)[..., : group + 1, : 2 * half]
    # once in the tables' dtype and without gaps: a CPU's arithmetic is slow on gaps, and would cast at each operation
    first, second = rotated.to(cos.dtype, copy=True, memory_format=torch.contiguous_format).split(half, -1)
    cos, sin = cos[:, None, None], (-sin if back else sin)[:, None, None]
    rotated[..., :half] = first * cos - second * sin  # the tables' dtype is the exact one, so this is too
    rotated[..., half:] = second * cos + first * sin


def _shape(qkv: Tensor, cos: Tensor, sin: Tensor, head_dim: int, group: int, back: bool) -> None:
    return None


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def rotary(  # type: ignore[no-untyped-def]
        qkv_ptr,
        cos_ptr,
        sin_ptr,
        vectors,
        heads,
        length,
        stride,
        D: tl.constexpr,
        GROUP: tl.constexpr,
        HALF: tl.constexpr,
        WIDTH: tl.constexpr,
        VECTORS: tl.constexpr,
        BACK: tl.constexpr,
    ):
        """``vectors``: the queries and keys of all tokens. A program rotates VECTORS of them."""
        vector = tl.program_id(0) * VECTORS + tl.arange(0, VECTORS)
        token = vector // ((GROUP + 1) * heads)
        within = vector % ((GROUP + 1) * heads)
        plane = tl.arange(0, WIDTH)
        inside = (vector < vectors)[:, None] & (plane < HALF)[None, :]
        angle = (token % length)[:, None] * HALF + plane[None, :]
        cos = tl.load(cos_ptr + angle, mask=inside, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=inside, other=0.0)
        if BACK:
            sin = -sin
        # tokens x row may pass 2^31
        start = token.to(tl.int64) * stride + (within // (GROUP + 1)) * ((GROUP + 2) * D) + (within % (GROUP + 1)) * D
        first_ptr = qkv_ptr + start[:, None] + plane[None, :]
        first = tl.load(first_ptr, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(first_ptr + HALF, mask=inside, other=0.0).to(tl.float32)
        kind = qkv_ptr.dtype.element_ty
        tl.store(first_ptr, (first * cos - second * sin).to(kind), mask=inside)
        tl.store(first_ptr + HALF, (second * cos + first * sin).to(kind), mask=inside)

    def _kernel(qkv: Tensor, cos: Tensor, sin: Tensor, head_dim: int, group: int, back: bool) -> None:
        (tokens, row), (length, half) = qkv.shape, cos.shape
        heads = row // ((group + 2) * head_dim)
        vectors = (group + 1) * tokens * heads
        if qkv.dtype == torch.float64 or vectors >= 2**31 - _ELEMENTS:
            return _define(qkv, cos, sin, head_dim, group, back)
        if not qkv.numel() or not half:
            return
        width = triton.next_power_of_2(half)
        each = max(1, _ELEMENTS // width)
        rotary[(triton.cdiv(vectors, each),)](
            qkv,
            cos.contiguous(),
            sin.contiguous(),
            vectors,
            heads,
            length,
            qkv.stride(0),
            D=head_dim,
            GROUP=group,
            HALF=half,
            WIDTH=width,
            VECTORS=each,
            BACK=back,
            num_warps=_WARPS,
            **LAUNCH,
        )
else:
    _kernel = None  # type: ignore[assignment]

apply_rotary = define("rotate_", _define, shapes=_shape, kernel=_kernel, mutates=("qkv",))
