"""Biases whose gradients come from what reads the sums they are part of, and the gradient of the projection as one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import megarewarm_kernels as kernels
import pytest
import torch
from megarewarm_kernels.layer.given_bias import give_bias_gradients
from torch import Tensor
from torch.nn import functional as F
from torch.utils import checkpoint

from tests.support.attention_cases import by_torch, starts_of
from tests.support.joined_cases import joined, true_gradients

BACKENDS = ["blocks", "sdpa", "reference", "triton"]
"""As on a CPU: torch's, the definition, the definition of this package's own."""


def attended(arguments: Sequence[Tensor], backend: str | None, **named: Any) -> Tensor:
    """Attention on a projection; by PyTorch alone where ``backend`` is None."""
    x, weight, bias = arguments
    half = 3
    angles = torch.linspace(0, 2, x.shape[1] * half, dtype=torch.float64).view(-1, half)
    cos, sin = (table.to(torch.promote_types(x.dtype, torch.float32)) for table in (angles.cos(), angles.sin()))
    if backend is None:
        return by_torch(F.linear(x, weight, bias), cos, sin, **named)
    qkv = F.linear(x, weight, bias.detach().to(x.dtype))
    if backend == "triton":
        return kernels.flash_attention(qkv, cos, sin, bias=bias, **named)
    return kernels.attention(qkv, cos, sin, bias=bias, backend=backend, **named)


def given(batch: int, length: int, heads: int, group: int, head_dim: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    random, row = torch.Generator().manual_seed(0), heads * (group + 2) * head_dim
    shapes = ((batch, length, 5), (row, 5), (row,))
    return [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "documents"),
    [((2, 9, 2, 1, 8), None), ((1, 1, 1, 1, 6), None), ((1, 7, 2, 2, 10), [[3, 4]]), ((3, 6, 1, 6, 7), None)],
)
def test_all_gradients_are_those_of_a_bias_in_the_projection(backend: str, shape: Any, documents: Any) -> None:
    arguments = given(*shape)
    named = {"head_dim": shape[4], "group": shape[3], "starts": starts_of(documents, shape[1]) if documents else None}
    wanted = torch.autograd.grad(attended(arguments, None, **named).square().sum(), arguments)
    found = torch.autograd.grad(attended(arguments, backend, **named).square().sum(), arguments)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_trains_gets_a_gradient(backend: str) -> None:
    for number in range(3):
        arguments = [argument.detach() for argument in given(1, 4, 1, 1, 6)]
        arguments[number].requires_grad_()
        wanted, found = (
            torch.autograd.grad(attended(arguments, way, head_dim=6).square().sum(), [arguments[number]])[0]
            for way in (None, backend)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sum_is_taken_in_fp32(backend: str) -> None:
    """The same numbers in bf16, where a sum in bf16 would be wrong in the third digit, and its rounding is."""
    arguments = [*given(4, 64, 1, 1, 8, torch.bfloat16)[:2], given(1, 1, 1, 1, 8, torch.float32)[2]]
    out = attended(arguments, backend, head_dim=8)
    (found,) = torch.autograd.grad(out.float().square().sum(), [arguments[2]])
    assert found.dtype == torch.float32
    assert (found != found.bfloat16()).float().mean() > 0.8, "not rounded to bf16"


def test_the_values_bias_gets_the_sum_of_the_output_gradients() -> None:
    """Attention's weights add up to 1, so a constant added to all values is added to the output; one added to all keys changes
    nothing at all without rotation."""
    _, _, bias = given(2, 9, 1, 1, 6)
    qkv = torch.randn(2, 9, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    none = torch.zeros(9, 0, dtype=torch.float64)
    out = kernels.attention(qkv, none, none, head_dim=6, bias=bias, backend="sdpa")
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    (found,) = torch.autograd.grad(out, [bias], grad)
    torch.testing.assert_close(found[12:], grad.sum((0, 1)))
    torch.testing.assert_close(found[6:12], torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_sum_gives_its_biases_their_gradients() -> None:
    y, one, other = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 4), (4,), (4,)))
    wanted = torch.autograd.grad((y + one + other).square().sum(), [y, one, other])
    whole = give_bias_gradients(y + one.detach() + other.detach(), one, None, other)
    for mine, theirs in zip(torch.autograd.grad(whole.square().sum(), [y, one, other]), wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert give_bias_gradients(y, None) is y


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_whole_and_checkpointed(backend: str) -> None:
    arguments = given(2, 5, 1, 2, 6, torch.float32)
    ours = lambda *inputs: attended(inputs, backend, head_dim=6, group=2)  # noqa: E731
    wanted = torch.autograd.grad(ours(*arguments).square().sum(), arguments)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    again = lambda *inputs: checkpoint.checkpoint(ours, *inputs, use_reentrant=False)  # noqa: E731
    for function in (compiled, again):
        found = torch.autograd.grad(function(*arguments).square().sum(), arguments)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("batch", "group", "head_dim", "half"), [(2, 1, 8, 2), (1, 2, 7, 3), (2, 6, 10, 5), (2, 2, 6, 0)])
def test_the_joined_gradient_is_that_of_splitting_and_turning(batch: int, group: int, head_dim: int, half: int) -> None:
    for each in (False, True):
        case = joined(batch, 5, 2, group, head_dim, half, torch.float64, each=each)
        for one, other in zip(torch.ops.megarewarm.join_gradients(*case), true_gradients(case), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        without, none = torch.ops.megarewarm.join_gradients(*case[:5], None, group)
        torch.testing.assert_close(without, true_gradients(case)[0], rtol=1e-12, atol=1e-12)
        assert none.shape == (0,)


@pytest.mark.parametrize("biased", [False, True])
def test_the_operator_keeps_pytorchs_rules(biased: bool) -> None:
    case = joined(2, 4, 2, 2, 6, 2, torch.float32)
    arguments = case if biased else (*case[:5], None, case[6])
    checks = torch.library.opcheck(
        torch.ops.megarewarm.join_gradients.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
    assert set(checks.values()) == {"SUCCESS"}


def test_wrong_biases_are_named() -> None:
    qkv, none = torch.zeros(1, 4, 18), torch.zeros(4, 0)
    for function in (kernels.attention, kernels.flash_attention):
        with pytest.raises(ValueError, match=r"bias is \(18,\), got \(17,\)"):
            function(qkv, none, none, head_dim=6, bias=torch.zeros(17))
        with pytest.raises(ValueError, match=r"'bias' is torch.int64"):
            function(qkv, none, none, head_dim=6, bias=torch.zeros(18, dtype=torch.int64))
