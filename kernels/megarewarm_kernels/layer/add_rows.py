"""Rows added to those of a matrix that ids name: the gradient of an embedding, straight into what is there already.

total[ids[i]] += rows[i], always in the same order, without atomics: the ids are sorted, and one program adds up the rows of
one id, a tile of them at a time. Bytes moved: each row once, and each row of ``total`` that is named read and written. PyTorch
makes a matrix of zeros, which is then added: 4 and 12 bytes for every value of ``total``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megarewarm_kernels.operators import HAS_TRITON, LAUNCH, check_floats, define

_ROWS, _COLUMNS, _WARPS = 16, 256, 4


def add_rows_(total: Tensor, ids: Tensor, rows: Tensor) -> None:
    """Add ``rows`` (t, h), any floating dtype, to the rows ``ids`` (t,) int64 of ``total`` (v, h), contiguous, in place.

    Sums of one id are fp32 (fp64 for fp64), in the same order at every run on a GPU. ``ids`` are within 0 and v - 1: they are
    not looked at. Raises ValueError on wrong shapes or dtypes.
    """
    if total.dim() != 2 or ids.dim() != 1 or rows.shape != (len(ids), total.shape[1]) or not total.is_contiguous():
        raise ValueError(
            f"need total (v, h) without gaps, ids (t,) and rows (t, h), got {tuple(total.shape)}, {tuple(ids.shape)} and "
            f"{tuple(rows.shape)}"
        )
    check_floats(total=total, rows=rows)
    if ids.dtype != torch.int64:
        raise ValueError(f"'ids' is {ids.dtype}, need torch.int64")
    _operator(total, ids, rows)


def _define(total: Tensor, ids: Tensor, rows: Tensor) -> None:
    total.index_add_(0, ids, rows.to(total.dtype))


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def add_rows(  # type: ignore[no-untyped-def]
        total_ptr, sorted_ptr, order_ptr, rows_ptr, count, width, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
    ):
        first = tl.program_id(0).to(tl.int64)
        token = tl.load(sorted_ptr + first)
        before = tl.load(sorted_ptr + first - 1, mask=first > 0, other=-1)
        if token != before:
            column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
            inside = column < width
            total = tl.zeros((COLUMNS,), tl.float32)
            found = ROWS
            while found == ROWS:
                place = first + tl.arange(0, ROWS)
                same = tl.load(sorted_ptr + place, mask=place < count, other=-1) == token
                row = tl.load(order_ptr + place, mask=same, other=0)
                at = row[:, None] * stride + column[None, :]
                each = tl.load(rows_ptr + at, mask=same[:, None] & inside[None, :], other=0.0)
                total += tl.sum(each.to(tl.float32), axis=0)
                found = tl.sum(same.to(tl.int32), axis=0)
                first += ROWS
            to = total_ptr + token.to(tl.int64) * width + column
            tl.store(to, tl.load(to, mask=inside, other=0.0) + total, mask=inside)

    def _kernel(total: Tensor, ids: Tensor, rows: Tensor) -> None:
        if total.dtype != torch.float32 or rows.dtype == torch.float64:
            _define(total, ids, rows)
        elif rows.numel():
            rows = rows if rows.stride(1) == 1 else rows.contiguous()
            found, order = ids.to(torch.int32).sort(stable=True)  # half the passes of int64
            grid = len(ids), triton.cdiv(total.shape[1], _COLUMNS)
            tile = {"ROWS": _ROWS, "COLUMNS": _COLUMNS, "num_warps": _WARPS}
            add_rows[grid](total, found, order, rows, len(ids), total.shape[1], rows.stride(0), **tile, **LAUNCH)
else:
    _kernel = None  # type: ignore[assignment]


def _shape(total: Tensor, ids: Tensor, rows: Tensor) -> None:
    return None


_operator = define("add_rows_", _define, shapes=_shape, kernel=_kernel, mutates=("total",))
