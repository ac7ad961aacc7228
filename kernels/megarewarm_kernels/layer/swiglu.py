"""SwiGLU of a fused projection whose rows are interleaved: gate_0, up_0, gate_1, up_1, ...

y_i = silu(gate_i) up_i with silu(z) = z sigmoid(z) (Shazeer 2020, arXiv 2002.05202, eq. 5, beta = 1). Interleaved rows keep a
gate beside its factor, so a slice of the projection's rows is a smaller SwiGLU by itself: what tensor parallelism divides.

Bytes moved, bf16, n results: forward 6 n (2 n values read, n written), backward 10 n (3 n values read, 2 n written). Separate
silu and product move 4 n + 6 n forward and at least 14 n backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarewarm_kernels.operators import HAS_TRITON, LAUNCH, check_floats, define, exact, rows_of

_BLOCK = 1024  # results of a program
_WARPS = 4
_CHUNK = 2**17  # results that the definition of the derivative computes at a time: what it holds beside stays in the cache


def swiglu(pairs: Tensor) -> Tensor:
    """``silu(gate) * up``, computed in fp32 (fp64 for fp64) and rounded once.

    Args:
        pairs: (..., 2 f), any floating dtype: gate and up take turns.

    Returns:
        (..., f) in the dtype of pairs, as is the gradient. Keeps only pairs for the backward pass. Raises ValueError on a wrong
        shape or dtype.
    """
    if not pairs.dim() or pairs.shape[-1] % 2:
        raise ValueError(f"need pairs (..., 2 f), got {tuple(pairs.shape)}")
    check_floats(pairs=pairs)
    result: Tensor = _Swiglu.apply(pairs)
    return result


def reference(pairs: Tensor) -> Tensor:
    """The definition of ``swiglu`` in plain PyTorch."""
    gate, up = _apart(pairs.to(exact(pairs.dtype)))
    return (gate * torch.sigmoid(gate) * up).to(pairs.dtype)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: Tensor) -> Tensor:
        ctx.save_for_backward(pairs)
        result: Tensor = _forward(pairs)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        result: Tensor = _backward(grad, *ctx.saved_tensors)
        return result


def _apart(pairs: Tensor) -> tuple[Tensor, ...]:
    """(gates, ups), (..., f) each, views with a stride of 2."""
    return pairs[..., 0::2], pairs[..., 1::2]


def _define_forward(pairs: Tensor) -> Tensor:
    gate, up = _apart(pairs)
    # a copy first: silu along a stride of 2 takes twice as long
    wide = gate.to(exact(pairs.dtype), copy=True, memory_format=torch.contiguous_format)
    return torch.ops.aten.silu_(wide).mul_(up).to(pairs.dtype)


def _define_backward(grad: Tensor, pairs: Tensor) -> Tensor:
    kind, size = exact(pairs.dtype), grad.shape[-1]
    flat_grad, flat = grad.reshape(-1, size), pairs.reshape(-1, 2 * size)
    result = torch.empty_like(flat, memory_format=torch.contiguous_format)
    together = result.view(-1, size, 2)
    rows = max(1, _CHUNK // max(1, size))
    scratch = torch.empty((3, min(rows, len(flat)), size), dtype=kind, device=pairs.device)
    for begin in range(0, len(flat), rows):
        here = slice(begin, begin + rows)
        gate, up = _apart(flat[here])
        wide, dup, dgate = scratch[:, : len(gate)]
        wide.copy_(gate)
        torch.ops.aten.silu.out(wide, out=dup).mul_(flat_grad[here])
        torch.mul(flat_grad[here].to(kind), up, out=dgate)
        torch.ops.aten.silu_backward.grad_input(dgate, wide, grad_input=dgate)
        if result.dtype == kind:  # as complex numbers: the fastest way to interleave
            torch.complex(dgate, dup, out=torch.view_as_complex(together[here]))
        else:
            together[here, :, 0], together[here, :, 1] = dgate, dup
    return result.view(pairs.shape)


def _shape_forward(pairs: Tensor) -> Tensor:
    return pairs.new_empty((*pairs.shape[:-1], pairs.shape[-1] // 2))


def _shape_backward(grad: Tensor, pairs: Tensor) -> Tensor:
    return pairs.new_empty(pairs.shape)


if HAS_TRITON:
    import triton
    import triton.language as tl

    from megarewarm_kernels.operators import LOG2_E

    @triton.jit
    def load_pairs(ptr, start, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """(gates, ups) of BLOCK pairs from pair ``start`` on, of the ``size`` that there are. Neighbours are read together."""
        value = tl.arange(0, 2 * BLOCK)
        pairs = tl.load(ptr + 2 * start + value, mask=value < 2 * (size - start), other=0.0).to(tl.float32)
        return tl.split(tl.reshape(pairs, (BLOCK, 2)))

    @triton.jit
    def swiglu_forward(pairs_ptr, y_ptr, size, blocks, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """``blocks``: programs for a row of ``size`` results. ``stride``: of the rows of pairs."""
        row = (tl.program_id(0) // blocks).to(tl.int64)  # offsets may pass 2^31
        start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
        gate, up = load_pairs(pairs_ptr + row * stride, start, size, BLOCK)
        column = tl.arange(0, BLOCK)
        y = gate / (1.0 + tl.exp2(gate * -LOG2_E)) * up
        tl.store(y_ptr + row * size + start + column, y.to(y_ptr.dtype.element_ty), mask=column < size - start)

    @triton.jit
    def swiglu_backward(  # type: ignore[no-untyped-def]
        grad_ptr, pairs_ptr, dpairs_ptr, size, blocks, grad_stride, stride, BLOCK: tl.constexpr
    ):
        row = (tl.program_id(0) // blocks).to(tl.int64)
        start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
        gate, up = load_pairs(pairs_ptr + row * stride, start, size, BLOCK)
        column = tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + row * grad_stride + start + column, mask=column < size - start, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp2(gate * -LOG2_E))
        silu = gate * sigmoid
        dgate = grad * up * (sigmoid + silu * (1.0 - sigmoid))
        dpairs = tl.reshape(tl.join(dgate, grad * silu), (2 * BLOCK,))
        value = tl.arange(0, 2 * BLOCK)
        to = dpairs_ptr + 2 * (row * size + start) + value
        tl.store(to, dpairs.to(dpairs_ptr.dtype.element_ty), mask=value < 2 * (size - start))

    def _rows(*parts: Tensor) -> tuple[list[Tensor], int, int]:
        """The parts as rows with neighbouring columns, of which tensors that are contiguous need only one; how many rows, and
        results in one."""
        if all(part.is_contiguous() for part in parts):
            return [part.view(1, -1) for part in parts], 1, parts[0].numel()
        flat = [rows_of(part) for part in parts]
        return flat, *flat[0].shape

    def _kernel_forward(pairs: Tensor) -> Tensor:
        if pairs.dtype == torch.float64:
            return _define_forward(pairs)
        y = _shape_forward(pairs)
        if y.numel():
            (flat,), rows, double = _rows(pairs)
            size = double // 2
            blocks = triton.cdiv(size, _BLOCK)
            swiglu_forward[(rows * blocks,)](flat, y, size, blocks, flat.stride(0), BLOCK=_BLOCK, num_warps=_WARPS, **LAUNCH)
        return y

    def _kernel_backward(grad: Tensor, pairs: Tensor) -> Tensor:
        if pairs.dtype == torch.float64:
            return _define_backward(grad, pairs)
        dpairs = _shape_backward(grad, pairs)
        if dpairs.numel():
            (flat_grad, flat), rows, size = _rows(grad, pairs)
            blocks, strides = triton.cdiv(size, _BLOCK), (flat_grad.stride(0), flat.stride(0))
            swiglu_backward[(rows * blocks,)](
                flat_grad, flat, dpairs, size, blocks, *strides, BLOCK=_BLOCK, num_warps=_WARPS, **LAUNCH
            )
        return dpairs
else:
    _kernel_forward = _kernel_backward = None  # type: ignore[assignment]

_forward = define("swiglu", _define_forward, shapes=_shape_forward, kernel=_kernel_forward)
_backward = define("swiglu_backward", _define_backward, shapes=_shape_backward, kernel=_kernel_backward)
