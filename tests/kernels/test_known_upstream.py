"""Head and loss whose upstream gradient is known: gradients scaled where they are made, the weight's added where it lies. The
form of a GPU by its kernels' definitions; float64 and autograd's way are the judges."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from megarewarm_kernels import linear_cross_entropy
from megarewarm_kernels.loss import logits_in_place
from torch import Tensor, nn

from tests.support.loss_cases import arguments, by_torch, errors, in_place

MICRO_BATCHES, TOKENS, WIDTH = 3, 48, 12


@pytest.fixture(autouse=True)
def as_on_a_gpu() -> Iterator[None]:
    with in_place():
        yield


def adds_in_fp32(total: Tensor, dz: Tensor, x: Tensor, *, first: bool) -> None:
    """The product that adds matrices in a lower dtype to fp32, by another definition."""
    total.addmm_(dz.t().float(), x.float(), beta=0 if first else 1)


@dataclass
class Case:
    """``rows`` of the head, of which ``valid`` are classes; the rest as for ``linear_cross_entropy``."""

    dtype: torch.dtype = torch.bfloat16
    rows: int = 130
    valid: int = 121
    z_loss: float = 0.0
    budget: int = 2**26

    def parts(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each micro-batch; the weight is that of the first."""
        return [arguments(TOKENS, WIDTH, self.rows, self.valid, self.dtype, seed) for seed in range(MICRO_BATCHES)]

    def ours(self, scale: float, *, known: bool, place: Tensor | None = None) -> list[Tensor]:
        """The losses, the gradient of the weight and those of the states; ``place``: where the first lies beforehand."""
        parts = self.parts()
        weight = nn.Parameter(parts[0][1].float())
        weight.grad = place
        upstream, found, states = torch.tensor(scale), [], []
        asked: dict[str, Any] = {"valid_rows": self.valid, "z_loss": self.z_loss, "memory_budget": self.budget}
        for hidden, _, targets in parts:
            hidden = hidden.requires_grad_()
            low = weight.detach().to(self.dtype)
            loss, _ = linear_cross_entropy(hidden, weight, targets, low=low, upstream=upstream if known else None, **asked)
            (loss * upstream).backward()
            assert weight.grad is not None and hidden.grad is not None and (place is None or weight.grad is place)
            found.append(loss.detach())
            states.append(hidden.grad)
        assert weight.grad is not None
        return [torch.stack(found), weight.grad, *states]

    def true(self, scale: float) -> list[Tensor]:
        """The same in float64."""
        parts = self.parts()
        weight = parts[0][1].double().requires_grad_()
        states = [hidden.double().requires_grad_() for hidden, *_ in parts]
        each = [
            by_torch(x, weight, targets, valid=self.valid, z_loss=self.z_loss)
            for x, (*_, targets) in zip(states, parts, strict=True)
        ]
        total = scale * torch.stack(each).sum()
        return [torch.stack(each).detach(), *torch.autograd.grad(total, [weight, *states])]


CASES = [Case(), Case(torch.float32), Case(rows=257, valid=257, z_loss=0.1), Case(budget=20 * 128 * 2)]


@pytest.mark.parametrize("case", CASES, ids=["bf16", "fp32", "odd", "chunks"])
@pytest.mark.parametrize("there", [False, True])
def test_gradients_against_float64(case: Case, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """``there``: into a slice of a flat tensor of zeros, as data-parallel ranks have it."""
    monkeypatch.setattr(logits_in_place, "accumulate", adds_in_fp32)
    scale, size = 3 / 1000, case.rows * WIDTH
    flat = torch.zeros(size + 20)
    found = case.ours(scale, known=True, place=flat[7 : 7 + size].view(-1, WIDTH) if there else None)
    plain, true = case.ours(scale, known=False), case.true(scale)
    for mine, other in zip(errors(found, true), errors(plain, true), strict=True):
        assert mine <= 1.2 * other + 1e-6  # one rounding less, but of other numbers
    assert not found[1][case.valid :].any(), "padding rows get no gradient"
    assert not flat[:7].any() and not flat[7 + size :].any()


@pytest.mark.parametrize("case", CASES[:3], ids=["bf16", "fp32", "odd"])
@pytest.mark.parametrize("scale", [1.0, 2.0**-21])
def test_a_power_of_two_gives_autograds_bits(case: Case, scale: float) -> None:
    for mine, other in zip(case.ours(scale, known=True), case.ours(scale, known=False), strict=True):
        assert torch.equal(mine, other)


def test_fp16_keeps_its_small_gradients() -> None:
    """Half of a wrong token's gradient, times this scale, is rounded to nothing in fp16; autograd's way has it in fp32."""
    case, scale = Case(torch.float16), 2.0**-21
    found, plain = case.ours(scale, known=True), case.ours(scale, known=False)
    assert all(torch.equal(mine, other) for mine, other in zip(found, plain, strict=True))
    assert errors(found[1:2], case.true(scale)[1:2])[0] < 2e-3
    rounded = (case.true(1.0)[1] / TOKENS / MICRO_BATCHES * scale).half().double() / scale
    assert errors([rounded], [case.true(1.0)[1] / TOKENS / MICRO_BATCHES])[0] > 0.5


@pytest.mark.parametrize("trains", ["head", "states", "neither"])
def test_what_is_frozen_gets_no_gradient(trains: str) -> None:
    hidden, weight, targets = arguments(9, 6, 70, 66, torch.float32)
    head, states = nn.Parameter(weight, requires_grad=trains == "head"), hidden.requires_grad_(trains == "states")
    loss, _ = linear_cross_entropy(states, head, targets, valid_rows=66, upstream=torch.tensor(0.25))
    assert loss.requires_grad == (trains != "neither")
    if trains != "neither":
        (loss * 0.25).backward()
    plain = [each.detach().clone().requires_grad_() for each in (states, head)]
    (0.25 * by_torch(plain[0], plain[1], targets, valid=66)).backward()
    for name, mine, other in (("states", states, plain[0]), ("head", head, plain[1])):
        assert (mine.grad is None) == (trains != name)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad)


def test_an_evaluation_adds_nothing() -> None:
    hidden, weight, targets = arguments(9, 6, 70, 66, torch.float32)
    head = nn.Parameter(weight)
    with torch.no_grad():
        linear_cross_entropy(hidden, head, targets, upstream=torch.tensor(0.25))
    assert head.grad is None


def test_no_token_at_all() -> None:
    hidden, weight, targets = arguments(9, 6, 70, 66, torch.float32)
    head, upstream = nn.Parameter(weight), torch.tensor(0.25)
    for states, wanted in ((hidden[:0], targets[:0]), (hidden, torch.full_like(targets, -100))):
        loss, _ = linear_cross_entropy(states.requires_grad_(), head, wanted, upstream=upstream)
        (loss * upstream).backward()
        assert loss.item() == 0 and head.grad is not None and not head.grad.any()


@pytest.mark.parametrize("weight", ["no leaf", "bf16"])
def test_a_weight_without_an_fp32_gradient_of_its_own_goes_autograds_way(weight: str) -> None:
    hidden, values, targets = arguments(9, 6, 70, 66, torch.bfloat16)
    leaf = values.requires_grad_() if weight == "bf16" else values.float().requires_grad_()
    head = leaf if weight == "bf16" else leaf * 1
    loss, _ = linear_cross_entropy(hidden, head, targets, upstream=torch.tensor(0.25))
    assert leaf.grad is None
    (loss * 0.25).backward()
    assert leaf.grad is not None and leaf.grad.any()


def test_another_gradient_or_a_second_backward_is_refused() -> None:
    hidden, weight, targets = arguments(9, 6, 70, 66, torch.float32)
    head, states = nn.Parameter(weight), hidden.requires_grad_()
    loss, _ = linear_cross_entropy(states, head, targets, upstream=torch.tensor(0.25))
    with pytest.raises(RuntimeError, match="the loss's gradient is not the 'upstream'"):
        loss.backward(retain_graph=True)
    (loss * 0.25).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward pass can't be had"):
        (loss * 0.25).backward()
