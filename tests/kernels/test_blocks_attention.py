"""Attention block by block on a CPU: what lengths of one block, as in test_attention.py, can't show."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from megarewarm_kernels.attention.blocks import blocks_attention
from megarewarm_kernels.attention.choose import attention
from torch import Tensor
from torch.nn import functional as F

from tests.support.attention_cases import arguments, assert_as_exact_as_torch, by_torch, errors, results

BLOCKS = importlib.import_module("megarewarm_kernels.attention.blocks")
SOFTMAX_BLOCKS = importlib.import_module("megarewarm_kernels.attention.softmax_blocks")
LONG = [[30, 101, 19], [150], [1, 63, 64, 22]]


def blocks(*given: Any, **named: Any) -> Tensor:
    return attention(*given, **named, backend="blocks")


@pytest.fixture(params=["softmax_blocks", "blocks"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms in fp64, that of bf16 too."""
    if request.param == "blocks":
        monkeypatch.setattr(BLOCKS, "softmax_blocks_attention", BLOCKS._Blocks.apply)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("scratch", [1, 2**17, 2**30])
@pytest.mark.parametrize(
    "way",
    [{}, {"group": 3}, {"documents": LONG}, {"window": 40}, {"group": 2, "window": 70, "documents": LONG}],
    ids=str,
)
def test_many_blocks_and_parts_of_them(way: dict[str, Any], scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """150 positions are two blocks and a part, ``scratch`` of a byte one head at a time, of 2^17 one row of a batch."""
    for module in (BLOCKS, SOFTMAX_BLOCKS):
        monkeypatch.setattr(module, "_SCRATCH", scratch)
    case = arguments(3, 150, 2, 8, 4, **way)
    for mine, wanted in zip(results(blocks, case), results(by_torch, case), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("way", [{}, {"group": 2, "documents": [[130, 382]]}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_as_exact_as_torch(dtype: torch.dtype, way: dict[str, Any]) -> None:
    assert_as_exact_as_torch(blocks, arguments(1, 512, 2, 32, 8, **way), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_positions_whose_own_weight_vanishes(dtype: torch.dtype) -> None:
    """Two keys draw everything, by scores of 150 and more: a position's own weight is 0 in fp32."""
    random = torch.Generator().manual_seed(0)
    query, key, value, grad = (torch.randn(1, 140, 1, 16, dtype=torch.float64, generator=random) for _ in range(4))
    query[..., 0] += 30
    key[:, :2, :, 0] = 20
    given = [x.to(dtype).requires_grad_() for x in (query, key, value)]
    exact = [x.detach().double().requires_grad_() for x in given]
    scores = exact[0][0, :, 0] @ exact[1][0, :, 0].T / 4
    assert (scores[:, 0] - scores.diagonal())[2:].min() > 100, "exp(-100) is 0 in fp32"

    def torchs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)

    def all_of(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        return [out, *torch.autograd.grad(out, inputs, grad.to(dtype).to(out.dtype))]

    wanted = all_of(torchs(*exact), exact)
    query, key, value = given
    outs = blocks_attention(query, key, value, None), torchs(query, key, value)
    ours, theirs = (errors(all_of(out, given), wanted) for out in outs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine <= 2 * other + torch.finfo(dtype).eps, (ours, theirs)


@pytest.mark.parametrize("group", [1, 2])
def test_operators_keep_pytorchs_rules(group: int) -> None:
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 70, heads, 4, generator=random) for heads in (2 * group, 2, 2))
    ops = torch.ops.megarewarm
    for first in (None, torch.zeros(1, 70, dtype=torch.int32)):
        out, lse = ops.blocks_attention.default(query, key, value, first)
        for operator, given in (
            (ops.blocks_attention, (query, key, value, first)),
            (ops.blocks_attention_backward, (out, out, lse, query, key, value, first)),
            (ops.softmax_blocks, (query, key, value, first)),
            (ops.softmax_blocks_backward, (out, query, key, value, first)),
        ):
            checks = torch.library.opcheck(operator.default, given, test_utils=("test_schema", "test_faketensor"))
            assert set(checks.values()) == {"SUCCESS"}
