"""AdamW in one pass: PyTorch's optimizer in float64 is the judge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megarewarm_kernels import AdamWTensors, adamw_, squared_norm
from megarewarm_kernels.optimizer.norm_tensors import NormTensors

from tests.support.adamw_cases import assert_guarded, assert_many_are_right, assert_norm_is_right, assert_right, state_of


@pytest.mark.parametrize("copy", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_steps_are_those_of_torch(dtype: torch.dtype, copy: torch.dtype | None) -> None:
    assert_right(1000, dtype, copy)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_squared_norm(dtype: torch.dtype) -> None:
    for size in (0, 1, 5000):
        assert_norm_is_right(size, dtype)


def test_operators_keep_pytorchs_rules() -> None:
    parameter, first, second, gradient, *_ = state_of(10, torch.bfloat16)
    numbers = (0.999, 0.9, 0.95, 1e-8, 1e-3, 2.0)
    for copy in (None, torch.empty(10, dtype=torch.bfloat16)):
        arguments = (parameter, gradient, first, second, copy, torch.tensor(0.5), *numbers)
        checks = torch.library.opcheck(
            torch.ops.megarewarm.adamw_.default, arguments, test_utils=("test_schema", "test_faketensor")
        )
        assert set(checks.values()) == {"SUCCESS"}
    checks = torch.library.opcheck(torch.ops.megarewarm.squared_norm.default, (parameter,))
    assert set(checks.values()) == {"SUCCESS"}


def test_wrong_arguments_are_named() -> None:
    parameter, first, second, gradient, *_ = state_of(10, torch.float32)
    call: dict[str, Any] = {"step": 1, "lr": 1e-3}
    with pytest.raises(ValueError, match=r"'gradient' is \(5,\), need \(10,\)"):
        adamw_(parameter, gradient[:5], first, second, **call)
    with pytest.raises(ValueError, match="without gaps"):
        adamw_(parameter, torch.zeros(20)[::2], first, second, **call)
    with pytest.raises(ValueError, match=r"moments have its dtype torch\.float32"):
        adamw_(parameter, gradient, first.half(), second, **call)
    with pytest.raises(ValueError, match="give the fp32 weights"):
        adamw_(parameter.half(), gradient, first.half(), second.half(), **call)
    with pytest.raises(ValueError, match="counted from 1"):
        adamw_(parameter, gradient, first, second, step=0, lr=1e-3)
    with pytest.raises(ValueError, match="without gaps"):
        squared_norm(torch.zeros(20)[::2])


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("sizes", [[1], [5, 1023, 1024, 1025, 0, 3]])
def test_many_tensors_at_once(sizes: list[int], apart: bool) -> None:
    assert_many_are_right(sizes, apart=apart)
    assert_many_are_right(sizes, apart=apart, copy=torch.bfloat16)


@pytest.mark.parametrize("copy", [None, torch.bfloat16])
def test_nothing_is_written_where_the_scale_is_not_a_number(copy: torch.dtype | None) -> None:
    assert_guarded(copy)


def test_a_scale_of_another_kind_is_refused() -> None:
    together = AdamWTensors([torch.zeros(4)], [torch.zeros(4)], [torch.zeros(4)], decays=[0.0])
    with pytest.raises(ValueError, match=r"'scale' is \(\) in torch.float64 on cpu, need \(\) in fp32 on cpu"):
        together.step([torch.ones(4)], step=1, lr=0.1, scale=torch.tensor(1.0, dtype=torch.float64))
    with pytest.raises(ValueError, match="need fp32 tensors without gaps"):
        NormTensors().squares([torch.zeros(4).bfloat16()])


def test_copies_of_another_kind_are_refused() -> None:
    parameters, firsts, seconds = ([torch.zeros(4), torch.zeros(4)] for _ in range(3))
    for copies, said in (
        ([None], "as many moments, decays and copies"),
        ([torch.zeros(4), None], "copies in bf16 or in fp16, got torch.float32"),
        ([torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.float16)], "torch.bfloat16, torch.float16"),
        ([torch.zeros(3, dtype=torch.bfloat16), None], r"need \(4,\) in torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=said):
            AdamWTensors(parameters, firsts, seconds, decays=[0.0, 0.0], copies=copies)


def test_many_tensors_have_to_fit_together() -> None:
    AdamWTensors([], [], [], decays=[]).step([], step=1, lr=0.1)
    one, two = torch.zeros(3), torch.zeros(4)
    with pytest.raises(ValueError, match="as many moments"):
        AdamWTensors([one], [one, one], [one], decays=[0.0])
    with pytest.raises(ValueError, match=r"need \(3,\) in torch.float32 .* got \(4,\)"):
        AdamWTensors([one], [two], [one], decays=[0.0])
    tensors = AdamWTensors([one], [one.clone()], [one.clone()], decays=[0.0])
    for bad in ([one.double()], [], [torch.zeros(6)[::2]]):
        with pytest.raises(ValueError, match="need"):
            tensors.step(bad, step=1, lr=0.1)
