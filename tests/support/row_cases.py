"""Rows added to a matrix as the tests see it: float64 is the judge."""

from __future__ import annotations

import torch
from megarewarm_kernels.layer.add_rows import add_rows_

IDS = {
    "none": [],
    "one": [3],
    "all the same": [6] * 70,
    "ends of tiles": [1] * 16 + [2] * 17 + [5] * 32 + [0] * 15,
    "mixed": [4, 0, 4, 6, 6, 0, 1, 4, 6, 4, 2] * 9,
}


def assert_rows_are_added(ids: list[int], width: int, dtype: torch.dtype) -> None:
    """Against float64, within NaN guards, from rows with gaps between them; twice the same bits."""
    random = torch.Generator().manual_seed(width)
    guarded = torch.full((9, width), float("nan"), dtype=torch.promote_types(dtype, torch.float32))
    total = guarded[1:8]
    total.copy_(torch.randn(7, width, generator=random))
    rows = torch.randn(len(ids), width + 3, generator=random).to(dtype)[:, :width]
    named = torch.tensor(ids, dtype=torch.int64)
    true = total.double().index_add(0, named, rows.double())
    again = total.clone()
    add_rows_(total, named, rows)
    add_rows_(again, named, rows)
    torch.testing.assert_close(total.double(), true, rtol=1e-5, atol=1e-5)
    assert torch.equal(total, again)
    assert guarded[0].isnan().all() and guarded[8].isnan().all()
