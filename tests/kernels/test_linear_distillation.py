"""Cross entropy and divergence from a teacher, chunk by chunk, against the definition and against gradients in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megarewarm_kernels import linear_cross_entropy, linear_distillation
from megarewarm_kernels.loss.linear_distillation import _operator, reference
from torch import Tensor

SHARE = 0.7


def problem(tokens: int, rows: int, padding: int = 0, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 6, generator=random, dtype=torch.float64).to(dtype)
    weight = torch.randn(rows + padding, 6, generator=random, dtype=torch.float64).to(dtype)
    targets = torch.randint(rows, (tokens,), generator=random)
    targets[torch.rand(tokens, generator=random) < 0.3] = -100
    teacher = torch.randn(tokens, 5, generator=random, dtype=torch.float64).to(dtype)
    head = torch.randn(rows + 2 * padding, 5, generator=random, dtype=torch.float64).to(dtype)
    return [hidden, weight, targets, teacher, head]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 40), st.integers(1, 20), st.integers(0, 3), st.integers(1, 4000), st.floats(0, 3), st.integers(1, 20))
def test_every_chunking_gives_the_definition(
    tokens: int, rows: int, padding: int, memory: int, share: float, known: int
) -> None:
    known = min(known, rows)
    ours, plain = problem(tokens, rows, padding), problem(tokens, rows, padding)
    for each in (ours, plain):
        each[0].requires_grad_(), each[1].requires_grad_()
    total, parts, count = linear_distillation(*ours, share=share, valid_rows=rows, teacher_rows=known, memory_budget=memory)
    expected, expected_parts, expected_count = reference(*plain, share=share, valid_rows=rows, teacher_rows=known)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(parts, expected_parts)
    assert int(count) == int(expected_count) and parts.requires_grad is False
    (2 * total).backward()
    (2 * expected).backward()
    torch.testing.assert_close(ours[0].grad, plain[0].grad)
    torch.testing.assert_close(ours[1].grad, plain[1].grad)


def test_gradients_are_those_of_finite_differences() -> None:
    hidden, weight, *rest = problem(7, 9, padding=2)

    def total(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_distillation(hidden, weight, *rest, share=SHARE, valid_rows=9, memory_budget=300)[0]

    assert torch.autograd.gradcheck(total, (hidden.requires_grad_(), weight.requires_grad_()))


def test_a_student_that_is_its_teacher_has_no_divergence_and_the_plain_gradient() -> None:
    hidden, weight, targets, *_ = problem(30, 11)
    weight.requires_grad_()
    total, parts, _ = linear_distillation(hidden, weight, targets, hidden, weight, share=5.0)
    (mine,) = torch.autograd.grad(total, weight)
    (plain,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets)[0], weight)
    torch.testing.assert_close(mine, plain)
    assert abs(float(parts[1])) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_is_no_worse_than_the_definitions(dtype: torch.dtype) -> None:
    """Against float64, at most twice the error that the definition has in the same dtype."""
    exact = [t.double() if t.is_floating_point() else t for t in problem(64, 50, dtype=dtype, seed=3)]
    errors = []
    for function in (linear_distillation, reference):
        given = problem(64, 50, dtype=dtype, seed=3)
        given[1].requires_grad_()
        grad = torch.autograd.grad(function(*given, share=SHARE)[0], given[1])[0]
        wanted = [t.clone() for t in exact]
        wanted[1].requires_grad_()
        errors.append(float((grad.double() - torch.autograd.grad(reference(*wanted, share=SHARE)[0], wanted[1])[0]).norm()))
    assert errors[0] <= 2 * errors[1]


def test_the_operator_is_well_defined_and_compiles_whole() -> None:
    given = problem(12, 9, dtype=torch.float32)
    torch.library.opcheck(_operator, (*given, 9, -100, SHARE, 8, 5, torch.float32, True, True))
    given[0].requires_grad_()
    function = torch.compile(lambda *t: linear_distillation(*t, share=SHARE)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(function(*given), linear_distillation(*given, share=SHARE)[0])


@pytest.mark.parametrize("wrong", range(6))
def test_wrong_shapes_are_refused(wrong: int) -> None:
    given = problem(4, 9, dtype=torch.float32)
    if wrong < 3:
        given[(0, 2, 3)[wrong]] = given[(0, 2, 3)[wrong]][:2]
        with pytest.raises(ValueError, match="need"):
            linear_distillation(*given, share=1.0)
    elif wrong == 3:
        with pytest.raises(ValueError, match=r"'teacher_hidden' is torch\.int64, need"):
            linear_distillation(given[0], given[1], given[2], given[3].long(), given[4], share=1.0)
    elif wrong == 4:
        with pytest.raises(ValueError, match="valid_rows 10"):
            linear_distillation(*given, share=1.0, valid_rows=10)
    else:
        with pytest.raises(ValueError, match=r"teacher_rows 9 does not lie in 1\.\.8"):
            linear_distillation(*given, share=1.0, valid_rows=8, teacher_rows=9)
