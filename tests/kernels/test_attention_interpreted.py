"""Attention's and rotary's Triton kernels, run by Triton's interpreter, in a process of their own (see tests/run)."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megarewarm_kernels import flash_attention
from megarewarm_kernels.attention import rotary

from tests.support.attention_cases import arguments, assert_as_exact_as_torch, by_torch, errors, results

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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "heads", "head_dim", "rotated", "documents"),
    [
        (1, 1, 1, 16, 4, None),
        (2, 77, 2, 64, 16, None),
        (1, 64, 1, 32, 32, None),
        (2, 70, 1, 24, 6, [[1, 33, 36], [64, 6]]),
        (1, 97, 2, 80, 20, [[31, 1, 32, 33]]),
    ],
)
def test_attention_is_as_exact_as_torch(batch, length, heads, head_dim, rotated, documents, dtype) -> None:
    given_to = arguments(batch, length, heads, head_dim, rotated, documents)
    assert_as_exact_as_torch(flash_attention, given_to, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("group", "window", "documents"),
    [
        (2, None, None),
        (6, None, None),
        (1, 20, None),
        (1, 1, None),
        (2, 33, [[40, 1, 36], [77]]),
        (6, 50, None),
        (2, 500, [[40, 1, 36], [77]]),
    ],
)
def test_groups_and_windows_are_as_exact_as_torch(group, window, documents, dtype) -> None:
    given_to = arguments(2, 77, 1 if group > 2 else 2, 16, 8, documents, group=group, window=window)
    assert_as_exact_as_torch(flash_attention, given_to, dtype)


@pytest.mark.parametrize("documents", [None, [[31, 1, 38], [70]]])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 160])
def test_the_blocks_that_gpus_get_in_fp32(monkeypatch: pytest.MonkeyPatch, head_dim: int, documents) -> None:
    monkeypatch.setattr(
        importlib.import_module("megarewarm_kernels.attention.flash_attention"), "architecture", lambda device: 90
    )
    case = arguments(2, 70, 1, head_dim, 4, documents)
    found, true = results(flash_attention, case.to(torch.float32)), results(by_torch, case)
    assert max(errors(found, true)) < 2e-6


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    cuts=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=2),
    head_dim=st.sampled_from([2, 16, 20, 33]),
    each=st.booleans(),
    packed=st.booleans(),
    group=st.integers(1, 3),
    window=st.none() | st.integers(1, 60),
)
def test_any_documents(cuts, head_dim, each, packed, group, window) -> None:
    length = max(map(sum, cuts))
    documents = [[*sizes, length - sum(sizes)] if sum(sizes) < length else sizes for sizes in cuts] if packed else None
    case = arguments(len(cuts), length, 1, head_dim, head_dim // 4 * 2, documents, each=each, group=group, window=window)
    found, true = results(flash_attention, case.to(torch.float32)), results(by_torch, case)
    assert max(errors(found, true)) < 2e-6


@pytest.mark.parametrize("way", [{}, {"group": 6}, {"group": 2, "window": 37}], ids=str)
def test_backward_is_the_same_at_every_run(way) -> None:
    case = arguments(2, 45, 1, 16, 4, [[20, 25], [45]], **way).to(torch.bfloat16)
    first, second = results(flash_attention, case), results(flash_attention, case)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("group", [1, 3])
def test_nothing_is_read_or_written_outside_of_the_tensors(group: int) -> None:
    """Guard bands of NaN around every argument; they stay, and none of them reaches a result."""
    case = arguments(2, 45, 2, 20, 8, [[13, 32], [45]], group=group).to(torch.float32)
    bands: list[torch.Tensor] = []

    def guarded(tensor: torch.Tensor | None) -> torch.Tensor:
        assert tensor is not None
        band = torch.full((tensor.numel() + 2048,), float("nan") if tensor.is_floating_point() else 7).to(tensor.dtype)
        inside = band[1024 : 1024 + tensor.numel()].view(tensor.shape)
        inside.copy_(tensor)
        bands.append(band)
        return inside

    qkv, starts, grad = (guarded(x) for x in (case.qkv, case.starts, case.grad))
    operators = torch.ops.megarewarm
    heads = case.head_dim, group
    out, lse = operators.flash_attention(qkv, starts, *heads)
    gradient = operators.flash_attention_backward(grad, qkv, guarded(out), guarded(lse), starts, *heads)
    plain_out, plain_lse = operators.flash_attention(case.qkv, case.starts, *heads)
    plain = operators.flash_attention_backward(case.grad, case.qkv, plain_out, plain_lse, case.starts, *heads)
    assert torch.equal(out, plain_out) and torch.equal(gradient, plain) and gradient.isfinite().all()
    turned, cos, sin = guarded(case.qkv.flatten(0, 1)), guarded(case.cos), guarded(case.sin)
    operators.rotate_(turned, cos, sin, *heads, False)
    wanted = rotary.reference(case.qkv.flatten(0, 1), case.cos, case.sin, head_dim=case.head_dim, group=group)
    assert torch.equal(turned, wanted)
    for band in bands:
        edges = torch.cat([band[:1024], band[-1024:]])
        assert edges.isnan().all() if edges.is_floating_point() else (edges == 7).all()


def test_offsets_beyond_two_to_the_31() -> None:
    """Two sequences 2^31 elements apart in memory, of which only a few pages are ever touched."""
    case = arguments(2, 20, 1, 16, 4).to(torch.float16)
    apart = torch.empty(2**31 + 20 * 48, dtype=torch.float16).as_strided((2, 20, 48), (2**31, 48, 1))
    apart.copy_(case.qkv)
    starts = torch.zeros(2, 20, dtype=torch.int32)
    with torch.no_grad():
        far = torch.ops.megarewarm.flash_attention(apart, starts, 16, 1)
        near = torch.ops.megarewarm.flash_attention(case.qkv, starts, 16, 1)
    assert all(torch.equal(one, other) for one, other in zip(far, near, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "repeats", "heads", "head_dim", "half"), [(1, 1, 1, 2, 1), (9, 3, 2, 16, 4), (33, 1, 3, 10, 5)]
)
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("group", [1, 2, 6])
def test_rotary_is_the_definition(rows, repeats, heads, head_dim, half, dtype, back, group) -> None:
    random = torch.Generator().manual_seed(rows)
    qkv = torch.randn(rows * repeats, heads * (group + 2) * head_dim, generator=random).to(dtype)
    angles = torch.randn(rows, half, generator=random)
    cos, sin = angles.cos(), angles.sin()
    ours = qkv.clone()
    torch.ops.megarewarm.rotate_(ours, cos, sin, head_dim, group, back)
    wanted = rotary.reference(qkv, cos, -sin if back else sin, head_dim=head_dim, group=group)
    torch.testing.assert_close(ours, wanted, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    untouched = ours.view(-1, heads, group + 2, head_dim)
    before = qkv.view(-1, heads, group + 2, head_dim)
    assert torch.equal(untouched[:, :, -1], before[:, :, -1]) and torch.equal(
        untouched[..., 2 * half :], before[..., 2 * half :]
    )
