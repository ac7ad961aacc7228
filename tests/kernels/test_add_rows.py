"""Rows added to those of a matrix that ids name, by the definition."""

from __future__ import annotations

import pytest
import torch
from megarewarm_kernels.layer.add_rows import add_rows_

from tests.support.row_cases import IDS, assert_rows_are_added


@pytest.mark.parametrize("ids", list(IDS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_are_added(ids: str, dtype: torch.dtype) -> None:
    assert_rows_are_added(IDS[ids], 5, dtype)


def test_the_operator_keeps_pytorchs_rules() -> None:
    arguments = torch.zeros(4, 3), torch.tensor([1, 1, 3]), torch.ones(3, 3)
    checks = torch.library.opcheck(
        torch.ops.megarewarm.add_rows_.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
    assert set(checks.values()) == {"SUCCESS"}


def test_wrong_arguments_are_named() -> None:
    total, ids, rows = torch.zeros(4, 3), torch.tensor([1, 1]), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"got \(4, 3\), \(2,\) and \(1, 3\)"):
        add_rows_(total, ids, rows[:1])
    with pytest.raises(ValueError, match=r"need total .* without gaps"):
        add_rows_(torch.zeros(3, 4).t(), ids, rows)
    with pytest.raises(ValueError, match=r"'ids' is torch\.int32"):
        add_rows_(total, ids.int(), rows)
