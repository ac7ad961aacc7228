"""The squared norm over all tensors of a list in one pass, wherever they lie: as ``squared_norm``, by a table as AdamW's.

Bytes moved: each value once, 4, and 4 for every ``_BLOCK`` x ``_WALK`` of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megarewarm_kernels.operators import HAS_TRITON, LAUNCH
from megarewarm_kernels.optimizer.adamw_tensors import blocks_of, send

_BLOCK = 1024
_WALK = 8  # blocks of a tensor that one program adds up
_WARPS = 4


class NormTensors:
    """Sums of squares of tensors that have the same sizes at every call; where they lie may change."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._places: list[int] = []

    def squares(self, tensors: Sequence[Tensor]) -> Tensor:
        """The sum of the squares of all values of contiguous fp32 ``tensors``, at least one, on one device where Triton runs.

        () fp64, added up in the same order at every run: squares in fp32, their partial sums in fp64. Raises ValueError for
        tensors with gaps or of another dtype.
        """
        for tensor in tensors:
            if tensor.dtype != torch.float32 or not tensor.is_contiguous():
                raise ValueError(f"need fp32 tensors without gaps, got {tuple(tensor.shape)} in {tensor.dtype}")
        sizes, device = [tensor.numel() for tensor in tensors], tensors[0].device
        if sizes != self._sizes:
            self._owners, self._begins, self._counts = blocks_of(sizes, _BLOCK * _WALK, device)
            self._table = torch.empty(len(sizes), dtype=torch.int64, device=device)
            self._sizes, self._places = sizes, []
        places = [tensor.data_ptr() for tensor in tensors]
        if places != self._places:
            send(places, self._table)
            self._places = places
        partial = torch.empty(self._owners.shape, dtype=torch.float32, device=device)
        if partial.numel():
            aligned = all(place % 16 == 0 for place in places) and all(size % 16 == 0 for size in sizes)
            squares_many[partial.shape](
                self._table,
                self._owners,
                self._begins,
                self._counts,
                partial,
                BLOCK=_BLOCK,
                WALK=_WALK,
                ALIGNED=aligned,
                num_warps=_WARPS,
                **LAUNCH,
            )
        return partial.sum(dtype=torch.float64)


if HAS_TRITON:
    import triton
    import triton.language as tl

    from megarewarm_kernels.optimizer.adamw_tensors import addresses

    @triton.jit
    def squares_many(  # type: ignore[no-untyped-def]
        table_ptr,
        owners_ptr,
        begins_ptr,
        sizes_ptr,
        partial_ptr,
        BLOCK: tl.constexpr,
        WALK: tl.constexpr,
        ALIGNED: tl.constexpr,
    ):
        block = tl.program_id(0).to(tl.int64)
        owner = tl.load(owners_ptr + block).to(tl.int64)
        first = (block - tl.load(begins_ptr + owner)) * (BLOCK * WALK)
        address, size = tl.load(table_ptr + owner), tl.load(sizes_ptr + owner)
        if ALIGNED:
            size = tl.multiple_of(size, 16)
        total = tl.zeros((BLOCK,), tl.float32)
        for step in tl.static_range(WALK):
            place = first + step * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(addresses(address, place, ALIGNED), mask=place < size, other=0.0)
            total += x * x
        tl.store(partial_ptr + block, tl.sum(total, axis=0))
