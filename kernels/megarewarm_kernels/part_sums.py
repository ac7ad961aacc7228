"""What programs have added up, one row of partial sums each, made the sums of all: one launch for up to six results.

No atomics: the rows are added in a fixed order, so that every run gives the same bits. Bytes moved: the rows once, 4 for each
number; k sums over c columns on 132 multiprocessors, whose ``programs`` are 528: 2,112 k c.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megarewarm_kernels.operators import HAS_TRITON, LAUNCH

MOST = 6


def sums_of(partial: Tensor, likes: Sequence[Tensor]) -> list[Tensor]:
    """The sums of ``partial`` (rows, k, c), fp32, over its rows: k tensors (c,), each in the dtype of its ``likes``, and the
    last of them again for each of ``likes`` from k on.

    Each has memory of its own: views of one tensor would keep all alive, and an operator may not return aliases. Raises
    ValueError for more than ``MOST`` results.
    """
    rows, count, columns = partial.shape
    if not count <= len(likes) <= MOST:
        raise ValueError(f"need a result for each row of sums, and at most {MOST}, got {count} rows and {len(likes)} results")
    out = [torch.empty(columns, dtype=like.dtype, device=partial.device) for like in likes]
    if columns:
        grid = (triton.cdiv(columns, _COLUMNS), len(out))
        padded = out + out[-1:] * (MOST - len(out))
        part_sums[grid](partial, *padded, rows, columns, count, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_WARPS, **LAUNCH)
    return out


if HAS_TRITON:
    import triton
    import triton.language as tl

    _ROWS, _COLUMNS, _WARPS = 32, 64, 4

    @triton.jit
    def part_sums(  # type: ignore[no-untyped-def]
        partial_ptr,
        out0_ptr,
        out1_ptr,
        out2_ptr,
        out3_ptr,
        out4_ptr,
        out5_ptr,
        rows,
        columns,
        count,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        which = tl.program_id(1)
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, rows, ROWS):
            row = start + tl.arange(0, ROWS)
            inside = (row < rows)[:, None] & (column < columns)[None, :]
            at = (row * count + min(which, count - 1))[:, None] * columns + column[None, :]
            total += tl.load(partial_ptr + at, mask=inside, other=0.0)
        found = tl.sum(total, axis=0)
        if which == 0:
            tl.store(out0_ptr + column, found.to(out0_ptr.dtype.element_ty), mask=column < columns)
        elif which == 1:
            tl.store(out1_ptr + column, found.to(out1_ptr.dtype.element_ty), mask=column < columns)
        elif which == 2:
            tl.store(out2_ptr + column, found.to(out2_ptr.dtype.element_ty), mask=column < columns)
        elif which == 3:
            tl.store(out3_ptr + column, found.to(out3_ptr.dtype.element_ty), mask=column < columns)
        elif which == 4:
            tl.store(out4_ptr + column, found.to(out4_ptr.dtype.element_ty), mask=column < columns)
        else:
            tl.store(out5_ptr + column, found.to(out5_ptr.dtype.element_ty), mask=column < columns)
