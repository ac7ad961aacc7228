"""The fused head and loss against its definition and float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megarewarm_kernels import linear_cross_entropy
from megarewarm_kernels.linear_cross_entropy import reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def inputs(t: int, h: int, v: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(t, h, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, h, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(v, (t,), generator=generator)


@given(
    t=st.integers(1, 40),
    h=st.integers(1, 9),
    v=st.integers(1, 30),
    budget=st.sampled_from([1, 300, 5000, 2**26]),
    ignored=st.sets(st.integers(0, 39)),
    padding=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_equals_the_definition(t: int, h: int, v: int, budget: int, ignored: set[int], padding: int) -> None:
    hidden, weight, targets = inputs(t, h, v)
    targets[[i for i in ignored if i < t]] = -100
    padded = torch.cat([weight.detach(), torch.full((padding, h), 7.0, dtype=torch.float64)]).requires_grad_()
    loss, count = linear_cross_entropy(hidden, padded, targets, valid_rows=v, memory_budget=budget)
    mine = torch.autograd.grad(loss, (hidden, padded))
    want_loss, want_count = reference(hidden, weight, targets)
    want = torch.autograd.grad(want_loss, (hidden, weight))
    assert int(count) == int(want_count) == int((targets != -100).sum())
    torch.testing.assert_close(loss, want_loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine[0], want[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mine[1][:v], want[1], rtol=1e-10, atol=1e-12)
    assert not mine[1][v:].any()


def test_gradcheck_and_a_second_backward() -> None:
    hidden, weight, targets = inputs(7, 4, 11)
    targets[2] = -100
    assert torch.autograd.gradcheck(
        lambda x, w: linear_cross_entropy(x, w, targets, memory_budget=500)[0], (hidden, weight), fast_mode=False
    )
    loss, _ = linear_cross_entropy(hidden, weight, targets)
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    once = tuple(gradient.clone() for gradient in once)
    twice = torch.autograd.grad(3 * loss, (hidden, weight))
    for first, second in zip(once, twice, strict=True):
        torch.testing.assert_close(second, 3 * first, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    hidden, weight, targets = inputs(7, 4, 11)
    want = torch.autograd.grad(reference(hidden, weight, targets)[0], (hidden, weight))
    if frozen in ("hidden", "both"):
        hidden = hidden.detach()
    if frozen in ("weight", "both"):
        weight = weight.detach()
    loss, _ = linear_cross_entropy(hidden, weight, targets)
    assert loss.requires_grad == (frozen != "both")
    if frozen == "both":
        return
    loss.backward()
    alive, expected = (weight, want[1]) if frozen == "hidden" else (hidden, want[0])
    torch.testing.assert_close(alive.grad, expected, rtol=1e-10, atol=1e-12)


def test_strides_do_not_matter() -> None:
    hidden, weight, targets = inputs(8, 6, 10)
    want, _ = linear_cross_entropy(hidden, weight, targets)
    strided = hidden.detach().t().contiguous().t().requires_grad_()
    turned = weight.detach().t().contiguous().t().requires_grad_()
    loss, _ = linear_cross_entropy(strided, turned, targets)
    assert not strided.is_contiguous() and loss.item() == pytest.approx(want.item(), rel=1e-14)
    loss.backward()


def test_a_sure_answer_keeps_its_small_gradient() -> None:
    """Where p is nearly 1, p - 1 must not be computed as a difference of rounded numbers."""
    for gap in (5.0, 10.0, 13.0):
        hidden = torch.tensor([[gap]], requires_grad=True)
        weight = torch.tensor([[1.0], [0.0]], requires_grad=True)
        loss, _ = linear_cross_entropy(hidden, weight, torch.tensor([0]))
        loss.backward()
        exact = -1 / (1 + torch.exp(torch.tensor(gap, dtype=torch.float64)))
        assert weight.grad is not None and weight.grad[0].item() == pytest.approx(gap * exact.item(), rel=1e-5, abs=gap * 6e-8)


def test_bf16_is_as_near_to_float64_as_the_definition_in_bf16() -> None:
    hidden, weight, targets = inputs(64, 32, 200)
    exact_loss, _ = reference(hidden, weight, targets)
    exact = torch.autograd.grad(exact_loss, (hidden, weight))
    low = [x.detach().to(torch.bfloat16).requires_grad_() for x in (hidden, weight)]
    loss, _ = linear_cross_entropy(low[0], low[1], targets, memory_budget=20_000)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact_loss.item(), rel=5e-3)
    mine = torch.autograd.grad(loss, low)
    plain = torch.autograd.grad(reference(low[0], low[1], targets)[0], low)
    for ours, theirs, want in zip(mine, plain, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert float((ours.double() - want).norm()) <= 1.1 * float((theirs.double() - want).norm())


def test_autocast_multiplies_in_its_dtype_and_returns_fp32() -> None:
    hidden, weight, targets = inputs(16, 8, 20, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_cross_entropy(hidden, weight, targets)
    rounded, _ = linear_cross_entropy(hidden.to(torch.bfloat16), weight.to(torch.bfloat16), targets)
    assert loss.dtype == torch.float32 and loss.item() == rounded.item()
    loss.backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor with a given number of columns that any operation made."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.bytes = columns, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[1] == self.columns:
                self.bytes = max(self.bytes, tensor.nbytes)
        return out


@pytest.mark.parametrize("budget", [16 * 333 * 4, 100_000, 2**20])
def test_logits_stay_within_the_budget(budget: int) -> None:
    hidden, weight, targets = inputs(512, 16, 333, torch.float32)
    from megarewarm_kernels.linear_cross_entropy import _chunk, _compute

    with Largest(333) as seen, torch.no_grad():
        chunk = _chunk(512, 333, torch.float32, budget)
        _compute(hidden, weight, targets, 333, -100, 0.0, chunk, torch.float32, False, True, True)
    assert budget / 4 < seen.bytes <= min(budget, 512 * 333 * 4)


def test_no_token_at_all() -> None:
    hidden, weight, targets = inputs(5, 3, 4, torch.float32)
    loss, count = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss.item() == 0 and int(count) == 0
    assert hidden.grad is not None and not hidden.grad.any() and weight.grad is not None and not weight.grad.any()
    empty, none = linear_cross_entropy(hidden[:0], weight, targets[:0])
    assert empty.item() == 0 and int(none) == 0


def test_wrong_shapes_are_named() -> None:
    hidden, weight, targets = inputs(5, 3, 4)
    with pytest.raises(ValueError, match=r"need hidden \(t, h\) and weight \(v, h\)"):
        linear_cross_entropy(hidden, weight[:, :2], targets)
    with pytest.raises(ValueError, match="one target per token"):
        linear_cross_entropy(hidden, weight, targets[:4])
    with pytest.raises(ValueError, match=r"valid_rows 5 does not lie in 1\.\.4"):
        linear_cross_entropy(hidden, weight, targets, valid_rows=5)


def test_torch_compile_takes_it_whole() -> None:
    hidden, weight, targets = inputs(8, 4, 10, torch.float32)
    compiled = torch.compile(lambda x, w: linear_cross_entropy(x.tanh(), w, targets)[0] * 2, fullgraph=True)
    got = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    want = torch.autograd.grad(2 * reference(hidden.tanh(), weight, targets)[0], (hidden, weight))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
