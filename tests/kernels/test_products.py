"""Linear layers by a copy in a lower dtype, their weights' gradients added by the product: float64 is the judge."""

from __future__ import annotations

import pytest
import torch
from megarewarm_kernels import products
from megarewarm_kernels.products import linear
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

MICRO_BATCHES = 8


def _layer(dtype: torch.dtype) -> tuple[nn.Parameter, nn.Parameter, list[Tensor], list[Tensor]]:
    """Weight and bias, and the inputs (2, 24, 12) and gradients (2, 24, 20) of some micro-batches, in ``dtype``."""
    random = torch.Generator().manual_seed(3)
    drawn = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    exact = torch.promote_types(dtype, torch.float32)
    weight, bias = (nn.Parameter(drawn(*shape).to(exact)) for shape in ((20, 12), (20,)))
    inputs, grads = ([drawn(2, 24, size).to(dtype) for _ in range(MICRO_BATCHES)] for size in (12, 20))
    return weight, bias, inputs, grads


def _true(weight: Tensor, bias: Tensor, inputs: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The gradients of weight, bias and inputs in float64, at the weight that products read."""
    w, b = (each.detach().to(inputs[0].dtype).double().requires_grad_() for each in (weight, bias))
    xs = [x.double().requires_grad_() for x in inputs]
    for x, grad in zip(xs, grads, strict=True):
        F.linear(x, w, b).backward(grad.double())
    assert w.grad is not None and b.grad is not None
    return w.grad, b.grad, [x.grad for x in xs if x.grad is not None]


def _ours(weight: nn.Parameter, bias: nn.Parameter, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    found = []
    low, low_bias = weight.detach().to(inputs[0].dtype), bias.detach().to(inputs[0].dtype)
    for x, grad in zip(inputs, grads, strict=True):
        x = x.clone().requires_grad_()
        linear(x, weight, bias, low, low_bias).backward(grad)
        assert x.grad is not None
        found.append(x.grad)
    return found


def _error(found: Tensor | None, true: Tensor) -> float:
    assert found is not None
    return float((found.double() - true).norm() / true.norm())


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_against_float64(dtype: torch.dtype, there: bool) -> None:
    """``there``: into a slice of a flat tensor that holds zeros, as data-parallel ranks have it."""
    weight, bias, inputs, grads = _layer(dtype)
    place = torch.zeros(300, dtype=weight.dtype)
    if there:
        weight.grad = place[7 : 7 + weight.numel()].view_as(weight)
    dx = _ours(weight, bias, inputs, grads)
    dw, db, true = _true(weight, bias, inputs, grads)
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    assert _error(weight.grad, dw) < bound and _error(bias.grad, db) < bound
    assert max(_error(mine, other) for mine, other in zip(dx, true, strict=True)) < bound
    if there:
        assert weight.grad is not None and weight.grad.data_ptr() == place[7:].data_ptr()
        assert not place[:7].any() and not place[7 + weight.numel() :].any()


def test_products_that_add_in_fp32_round_no_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's way, its product that adds bf16 matrices to fp32 by another definition: as exact as fp32, where autograd's casts
    are not."""
    calls = []

    def adds(total: Tensor, dz: Tensor, x: Tensor, *, first: bool) -> None:
        calls.append(first)
        total.addmm_(dz.t().float(), x.float(), beta=0 if first else 1)

    monkeypatch.setattr(products, "accumulate", adds)
    weight, bias, inputs, grads = _layer(torch.bfloat16)
    _ours(weight, bias, inputs, grads)
    dw, *_ = _true(weight, bias, inputs, grads)
    assert calls == [True] + [False] * (MICRO_BATCHES - 1)
    assert _error(weight.grad, dw) < 1e-6
    plain = weight.detach().clone().requires_grad_()
    for x, grad in zip(inputs, grads, strict=True):
        F.linear(x, plain.bfloat16()).backward(grad)
    assert _error(plain.grad, dw) > 1e-4


def test_a_frozen_weight_gets_nothing_and_lets_gradients_through() -> None:
    weight, bias, inputs, grads = _layer(torch.bfloat16)
    weight.requires_grad_(False)
    dx = _ours(weight, bias, inputs, grads)
    assert weight.grad is None and bias.grad is not None
    assert _error(dx[0], _true(weight, bias, inputs, grads)[2][0]) < 4e-3


def test_a_checkpointed_layer_adds_once_and_multiplies_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, inputs, grads = _layer(torch.float32)
    x = inputs[0].requires_grad_()
    made: list[Tensor] = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *given, **named: made.append(addmm(*given, **named)) or made[-1])
    checkpoint(linear, x, weight, bias, weight.detach(), bias.detach(), use_reentrant=False).backward(grads[0])
    dw, *_ = _true(weight, bias, [inputs[0].detach()], grads[:1])
    assert _error(weight.grad, dw) < 1e-6
    assert len(made) == 1, "what is computed again ends before the product, as with F.linear"


def test_an_input_of_another_dtype_is_refused() -> None:
    weight, bias, inputs, _ = _layer(torch.float32)
    with pytest.raises(ValueError, match=r"'x' is torch\.float32"):
        linear(inputs[0], weight, bias, weight.detach().bfloat16(), bias.detach().bfloat16())
