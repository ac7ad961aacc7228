"""The kernel that joins attention's gradients, run by Triton's interpreter, in a process of its own (see tests/run)."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.joined_cases import joined, true_gradients

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="Triton decides at import: TRITON_INTERPRET=1 pytest -m interpreter"
    ),
]

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.support import triton_interpreter

    triton_interpreter.repair()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_right(case: tuple) -> None:
    """Each number of the projection's gradient rounded once, the bias's sums in fp32."""
    true, true_sums = true_gradients(case)
    found, sums = torch.ops.megarewarm.join_gradients(*case)
    assert found.is_contiguous() and found.dtype == case[0].dtype and sums.dtype == torch.float32
    bound = torch.finfo(found.dtype).eps * true.abs() + 8 * torch.finfo(torch.float32).eps
    assert ((found.double() - true).abs() <= bound).all()
    size = true.flatten(0, 1).abs().sum(0)  # of what is added up
    assert ((sums.double() - true_sums).abs() <= 1e-6 * size + 1e-6).all()
    alone, none = torch.ops.megarewarm.join_gradients(*case[:5], None, case[6])
    assert torch.equal(alone, found) and not none.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "heads", "group", "head_dim", "half"),
    [
        (1, 1, 1, 1, 16, 4),
        (2, 270, 2, 1, 64, 8),  # more than one program's tokens
        (1, 33, 5, 1, 80, 10),
        (2, 40, 3, 2, 24, 12),
        (3, 7, 1, 6, 10, 5),
        (2, 9, 2, 6, 7, 0),
        (1, 5, 2, 2, 128, 64),
    ],
)
def test_the_definition_in_float64(batch, length, heads, group, head_dim, half, dtype) -> None:
    for each in (False, True):
        assert_right(joined(batch, length, heads, group, head_dim, half, dtype, each=each))


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    heads=st.integers(1, 5),
    group=st.sampled_from([1, 2, 6]),
    head_dim=st.integers(1, 40),
    share=st.floats(0, 1),
    layout=st.sampled_from(["whole", "part", "expanded", "channels last but one"]),
)
def test_any_shape_and_strides(batch, length, heads, group, head_dim, share, layout) -> None:
    case = joined(batch, length, heads, group, head_dim, int(share * (head_dim // 2)), torch.float32)

    def laid_out(x: Tensor) -> Tensor:
        if layout == "part":
            return torch.nn.functional.pad(x, (3, 5, 1, 2), value=float("nan"))[:, :, 1:-2, 3:-5]
        if layout == "expanded":
            return x[:, :, :1].expand(x.shape)
        return x.transpose(2, 3).contiguous().transpose(2, 3) if layout != "whole" else x

    assert_right((*map(laid_out, case[:3]), *case[3:]))


def test_nothing_is_read_or_written_outside_of_the_tensors() -> None:
    """Guard bands of NaN around every argument; they stay, and none of them reaches a result."""
    case = joined(2, 45, 3, 2, 20, 4, torch.float32)
    bands: list[Tensor] = []

    def guarded(tensor: Tensor) -> Tensor:
        band = torch.full((tensor.numel() + 2048,), float("nan"))
        inside = band[1024 : 1024 + tensor.numel()].view(tensor.shape)
        inside.copy_(tensor)
        bands.append(band)
        return inside

    found = torch.ops.megarewarm.join_gradients(*map(guarded, case[:6]), case[6])
    for one, other in zip(found, torch.ops.megarewarm.join_gradients(*case), strict=True):
        assert torch.equal(one, other) and one.isfinite().all()
    for band in bands:
        assert torch.cat([band[:1024], band[-1024:]]).isnan().all()


def test_offsets_beyond_two_to_the_31() -> None:
    """Positions 2^30 elements apart, of which only a few pages are ever touched: the third begins at element 2^31."""
    case = joined(1, 3, 1, 1, 16, 4, torch.float16)

    def apart(x: Tensor) -> Tensor:
        far = torch.empty(2 * 2**30 + 16, dtype=torch.float16).as_strided((1, 3, 1, 16), (2**31, 2**30, 16, 1))
        return far.copy_(x)

    assert_right((*map(apart, case[:3]), *case[3:]))


def test_the_same_at_every_run() -> None:
    case = joined(2, 300, 2, 2, 16, 4, torch.bfloat16)
    first, second = (torch.ops.megarewarm.join_gradients(*case) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_no_tokens() -> None:
    case = joined(0, 4, 2, 1, 8, 2, torch.float32)
    found, sums = torch.ops.megarewarm.join_gradients(*case)
    assert found.shape == (0, 4, 48) and not sums.any()
