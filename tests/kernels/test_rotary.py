"""Rotary positions in place: the planes, the derivative, whose gradient is overwritten, what PyTorch asks of an operator."""

from __future__ import annotations

import megarewarm_kernels as kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megarewarm_kernels.attention.rotary import reference
from torch import Tensor
from torch.nn import functional as F
from torch.utils import checkpoint


def tables(rows: int, half: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    angles = torch.randn(rows, half, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_complex_numbers(qkv: Tensor, cos: Tensor, sin: Tensor, head_dim: int, group: int) -> Tensor:
    """One vector after the other, each plane a complex number: nothing in common with the implementation."""
    result, half = qkv.clone(), cos.shape[1]
    for token in range(qkv.shape[0]):
        turn = torch.complex(cos, sin)[token % cos.shape[0]]
        for head in range(qkv.shape[1] // ((group + 2) * head_dim)):
            for part in range(group + 1):
                at = ((group + 2) * head + part) * head_dim
                plane = torch.complex(qkv[token, at : at + half], qkv[token, at + half : at + 2 * half]) * turn
                result[token, at : at + half], result[token, at + half : at + 2 * half] = plane.real, plane.imag
    return result


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3),
    rows=st.integers(1, 4),
    heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 6]),
    dim=st.integers(1, 9),
    share=st.floats(0, 1),
)
def test_planes_are_turned_as_complex_numbers(batch: int, rows: int, heads: int, group: int, dim: int, share: float) -> None:
    cos, sin = tables(rows, int(share * (dim // 2)))
    qkv = random(batch * rows, heads * (group + 2) * dim)
    wanted = by_complex_numbers(qkv, cos, sin, dim, group)
    torch.testing.assert_close(reference(qkv, cos, sin, head_dim=dim, group=group), wanted, rtol=0, atol=1e-14)
    found = kernels.rotate_(qkv, cos, sin, head_dim=dim, group=group)
    assert found.data_ptr() == qkv.data_ptr()
    torch.testing.assert_close(qkv, wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_derivative(overwrite: bool, group: int) -> None:
    cos, sin = tables(2, 2)
    qkv = random(4, 2 * (group + 2) * 5).requires_grad_()

    def ours(x: Tensor) -> Tensor:
        return kernels.rotate_(x * 1.0, cos, sin, head_dim=5, group=group, overwrite_gradient=overwrite).square()

    assert torch.autograd.gradcheck(ours, [qkv])
    (found,) = torch.autograd.grad(ours(qkv).sum(), [qkv])
    (wanted,) = torch.autograd.grad(reference(qkv, cos, sin, head_dim=5, group=group).square().sum(), [qkv])
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computed_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    cos, sin = tables(8, 4, torch.float32)
    qkv = random(16, 3 * 3 * 10, dtype=dtype)
    true = reference(qkv.double(), cos.double(), sin.double(), head_dim=10)
    found = kernels.rotate_(qkv.clone(), cos, sin, head_dim=10)
    # fp32 may land on the other side of a midpoint, so a unit in the last place and not half of one
    bound = torch.finfo(dtype).eps * true.abs() + 4 * torch.finfo(torch.float32).eps
    assert ((found.double() - true).abs() <= bound).all()
    if dtype != torch.float32:
        assert (found == true.to(dtype)).float().mean() > 0.99


def test_turning_back_undoes_it_and_values_stay() -> None:
    cos, sin = tables(6, 3)
    qkv = random(12, 2 * 3 * 8)
    turned = kernels.rotate_(qkv.clone(), cos, sin, head_dim=8)
    values = [part.view(12, 2, 3, 8)[:, :, 2] for part in (qkv, turned)]
    rest = [part.view(12, 2, 3, 8)[..., 6:] for part in (qkv, turned)]
    assert torch.equal(*values) and torch.equal(*rest) and not torch.equal(qkv, turned)
    torch.testing.assert_close(kernels.rotate_(turned, cos, -sin, head_dim=8), qkv)


def test_a_gradient_that_others_have_too_is_left_alone() -> None:
    cos, sin = tables(4, 2)
    x, other = random(4, 3 * 4).requires_grad_(), random(4, 3 * 4, seed=2).requires_grad_()
    # addition hands one and the same gradient to both
    found = torch.autograd.grad(kernels.rotate_(x * 1.0, cos, sin, head_dim=4) + other, [x, other], random(4, 12, seed=3))
    assert torch.equal(found[1], random(4, 12, seed=3))
    # the gradient of a sum is one number, expanded
    (found_x,) = torch.autograd.grad(kernels.rotate_(x * 1.0, cos, sin, head_dim=4, overwrite_gradient=True).sum(), [x])
    (wanted,) = torch.autograd.grad(reference(x, cos, sin, head_dim=4).sum(), [x])
    torch.testing.assert_close(found_x, wanted)


def test_who_saved_it_hears_of_the_change() -> None:
    cos, sin = tables(4, 2)
    x = random(4, 12).requires_grad_()
    saved = x.exp()  # its derivative needs its result
    turned = kernels.rotate_(saved, cos, sin, head_dim=4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        turned.sum().backward()
    with pytest.raises(RuntimeError, match="leaf"):
        kernels.rotate_(x, cos, sin, head_dim=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("back", [False, True])
def test_the_operator_keeps_pytorchs_rules(dtype: torch.dtype, back: bool) -> None:
    cos, sin = tables(4, 2, torch.float32)
    arguments = (random(8, 24, dtype=dtype), cos, sin, 8, 1, back)
    checks = torch.library.opcheck(
        torch.ops.megarewarm.rotate_.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
    assert set(checks.values()) == {"SUCCESS"}


def test_compiled_whole_and_checkpointed() -> None:
    cos, sin = tables(3, 2)
    x, weight = random(6, 5), random(24, 5, seed=2).requires_grad_()

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return kernels.rotate_(F.linear(x, weight), cos, sin, head_dim=4).square()

    upstream = random(6, 24, seed=3)
    wanted = torch.autograd.grad(reference(F.linear(x, weight), cos, sin, head_dim=4).square(), [weight], upstream)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    again = lambda *inputs: checkpoint.checkpoint(ours, *inputs, use_reentrant=False)  # noqa: E731
    for function in (ours, compiled, again):
        torch.testing.assert_close(torch.autograd.grad(function(x, weight), [weight], upstream), wanted)


@pytest.mark.parametrize(
    ("qkv", "cos", "head_dim", "words"),
    [
        (torch.zeros(4, 25), torch.zeros(4, 2), 8, r"need qkv \(t, heads x 3 x 8\), got \(4, 25\)"),
        (torch.zeros(2, 4, 24), torch.zeros(4, 2), 8, "need qkv"),
        (torch.zeros(4, 24), torch.zeros(3, 2), 8, "4 tokens are no multiple of the 3 rows"),
        (torch.zeros(4, 24), torch.zeros(4, 5), 8, r"at most 4\), got \(4, 5\)"),
        (torch.zeros(4, 24), torch.zeros(4, 2, dtype=torch.float64), 8, "got torch.float64"),
        (torch.zeros(4, 24, dtype=torch.int64), torch.zeros(4, 2), 8, "'qkv' is torch.int64"),
        (torch.zeros(24, 4).t(), torch.zeros(4, 2), 8, "must be contiguous"),
    ],
)
def test_wrong_arguments_are_named(qkv: Tensor, cos: Tensor, head_dim: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kernels.rotate_(qkv, cos, cos, head_dim=head_dim)
    with pytest.raises(ValueError, match="two equal tables"):
        kernels.rotate_(torch.zeros(4, 24), torch.zeros(4, 2), torch.zeros(4, 3), head_dim=8)


def test_nothing_to_turn() -> None:
    qkv = random(4, 24)
    assert torch.equal(kernels.rotate_(qkv.clone(), *tables(4, 0), head_dim=8), qkv)
