"""The fused head and loss against its definition and float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megarewarm_kernels import linear_cross_entropy
from megarewarm_kernels.loss.linear_cross_entropy import reference
from megarewarm_kernels.loss.logit_passes import at_target, log_terms, logit_gradient_, logit_statistics
from megarewarm_kernels.loss.logits_in_place import chunk_of, compute, width_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.loss_cases import arguments, assert_as_exact_as_torch, by_torch, results


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


@pytest.mark.parametrize(("block", "part"), [(2**22, 2**22), (3 * 200 * 4, 7 * 32 * 2)])
def test_bf16_is_as_near_to_float64_as_the_definition_in_bf16(block: int, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megarewarm_kernels.loss.linear_cross_entropy._BLOCK", block)  # rows of a chunk, rows of W
    monkeypatch.setattr("megarewarm_kernels.products._SLICE", part)
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
    """Remembers the size of the largest tensor with a given number of columns that any operation made, and by dtype."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.bytes, self.of = columns, 0, dict[torch.dtype, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[1] == self.columns:
                self.bytes = max(self.bytes, tensor.nbytes)
                self.of[tensor.dtype] = max(self.of.get(tensor.dtype, 0), tensor.nbytes)
        return out


@pytest.mark.parametrize("budget", [16 * 333 * 4, 100_000, 2**20])
def test_logits_stay_within_the_budget(budget: int) -> None:
    hidden, weight, targets = inputs(512, 16, 333, torch.float32)
    from megarewarm_kernels.loss.linear_cross_entropy import _chunk, _compute

    with Largest(333) as seen, torch.no_grad():
        chunk = _chunk(512, 333, torch.float32, budget, "cpu")
        _compute(hidden, weight, None, targets, 333, -100, 0.0, chunk, torch.float32, False, True, True)
    assert budget / 4 < seen.bytes <= min(budget, 512 * 333 * 4)


@pytest.mark.parametrize("budget", [16 * 333 * 6, 100_000, 300_000])
def test_logits_in_bf16_and_a_few_in_fp32_stay_within_the_budget(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from megarewarm_kernels.loss import linear_cross_entropy as module

    monkeypatch.setattr(module, "_BLOCK", 40_000)
    hidden, weight, targets = inputs(512, 16, 333, torch.float32)
    with Largest(333) as seen, torch.no_grad():
        chunk = module._chunk(512, 333, torch.bfloat16, budget, "cpu")
        module._compute(hidden, weight, None, targets, 333, -100, 0.0, chunk, torch.bfloat16, False, True, True)
    assert set(seen.of) == {torch.bfloat16, torch.float32}
    assert budget / 4 < sum(seen.of.values()) <= budget


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


@pytest.mark.slow
def test_torch_compile_takes_it_whole() -> None:
    hidden, weight, targets = inputs(8, 4, 10, torch.float32)
    compiled = torch.compile(lambda x, w: linear_cross_entropy(x.tanh(), w, targets)[0] * 2, fullgraph=True)
    got = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    want = torch.autograd.grad(2 * reference(hidden.tanh(), weight, targets)[0], (hidden, weight))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# ---- z-loss, the passes over logits, and the choice of the kernel ---------------------------------------------------------


@given(
    t=st.integers(0, 40),
    v=st.integers(1, 30),
    budget=st.sampled_from([1, 300, 5000, 2**26]),
    ignored=st.sets(st.integers(0, 39)),
    padding=st.integers(0, 5),
    z_loss=st.sampled_from([1e-4, 0.1, 3.0]),
)
@settings(max_examples=40, deadline=None)
def test_z_loss_is_the_square_of_log_sum_exp(
    t: int, v: int, budget: int, ignored: set[int], padding: int, z_loss: float
) -> None:
    hidden, weight, targets = arguments(t, 5, v + padding, v, torch.float64)
    targets[[i for i in ignored if i < t]] = -100
    want = results(lambda h, w: by_torch(h, w, targets, valid=v, z_loss=z_loss), hidden, weight)
    asked: dict[str, Any] = {"valid_rows": v, "z_loss": z_loss}
    for function in (
        lambda h, w: linear_cross_entropy(h, w, targets, memory_budget=budget, **asked)[0],
        lambda h, w: reference(h, w, targets, **asked)[0],
    ):
        for mine, wanted in zip(results(function, hidden, weight), want, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("function", [linear_cross_entropy, reference])
def test_gradcheck_with_z_loss(function: Any) -> None:
    hidden, weight, targets = arguments(7, 4, 11, 9, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, w: function(x, w, targets, valid_rows=9, z_loss=0.3)[0],
        (hidden.requires_grad_(), weight.requires_grad_()),
        fast_mode=False,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_the_definition_is_as_exact_as_torch(dtype: torch.dtype, z_loss: float) -> None:
    for budget in (2**26, 20_000):
        assert_as_exact_as_torch(64, 32, 200, 195, dtype, z_loss=z_loss, budget=budget, kernel="reference")


def passes(logits: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Gradient and statistics of classes 10..10 + columns, the last two columns being padding."""
    logits = logits.clone()
    valid = logits.shape[1] - 2
    found = logit_statistics(logits, targets, 10, valid, -100)
    log_sum, log_p = log_terms(found)
    logit_gradient_(logits, targets, log_sum, at_target(log_sum, log_p, z_loss), 10, valid, -100, z_loss)
    return logits, found


@pytest.mark.parametrize("z_loss", [0.0, 0.2])
def test_the_passes_give_the_gradient_of_torch(z_loss: float) -> None:
    """Targets inside, at both ends, below and above (where the padding lies) of the classes, and none."""
    logits = 3 * torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([10, 16, 12, -100, 9, 17])
    gradient, found = passes(logits, targets, z_loss)
    inside = logits[:4, :7].clone().requires_grad_()
    kept = torch.tensor([0, 1, 2])
    loss = torch.nn.functional.cross_entropy(inside[kept], targets[kept] - 10, reduction="sum")
    loss = loss + z_loss * torch.logsumexp(inside[kept], 1).square().sum()
    (wanted,) = torch.autograd.grad(loss, [inside])
    torch.testing.assert_close(gradient[:4, :7], wanted, rtol=1e-12, atol=1e-12)
    # a target of other classes: its own logit is elsewhere, so here is p alone
    elsewhere = logits[4:, :7].softmax(1) * (1 + 2 * z_loss * torch.logsumexp(logits[4:, :7], 1))[:, None]
    torch.testing.assert_close(gradient[4:, :7], elsewhere, rtol=1e-12, atol=1e-12)
    assert not gradient[:, 7:].any() and found[2].tolist() == [logits[0, 0], logits[1, 6], logits[2, 2], 0, 0, 0]
    torch.testing.assert_close(log_terms(found)[0], torch.logsumexp(logits[:, :7], 1), rtol=1e-12, atol=1e-12)


def test_the_targets_gradient_does_not_cancel() -> None:
    log_p = torch.tensor([-1e-9, -1e-5, -0.1, -20.0])
    log_sum = torch.tensor([3.0, -2.0, 0.0, 1.0])
    for z_loss in (0.0, 1e-6):
        wanted = torch.expm1(log_p.double()) + 2 * z_loss * log_sum.double() * log_p.double().exp()
        torch.testing.assert_close(at_target(log_sum, log_p, z_loss).double(), wanted, rtol=1e-6, atol=0)


def test_a_copy_of_the_weight_is_read_in_its_place() -> None:
    """The same bits where it is the cast; another copy is what is multiplied, and one of another dtype is refused."""
    hidden, weight, targets = inputs(20, 8, 9, torch.float32)
    found: list[tuple[Tensor, Tensor]] = []
    for low in (None, weight.detach().bfloat16(), weight.detach().bfloat16() * 2):
        weight.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = linear_cross_entropy(hidden, weight, targets, low=low)
        loss.backward()
        assert weight.grad is not None
        found.append((loss.detach(), weight.grad.clone()))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[2][0])
    with pytest.raises(ValueError, match=r"'low' is \(9, 8\) in torch.bfloat16, need \(9, 8\) in torch.float32"):
        linear_cross_entropy(hidden, weight, targets, low=weight.detach().bfloat16())


def test_operators_keep_pytorchs_rules() -> None:
    hidden, weight, targets = (x.detach() for x in inputs(6, 4, 9, torch.float32))
    logits, low = hidden @ weight.t(), weight.bfloat16()
    log_sum, log_p = log_terms(logit_statistics(logits, targets, 0, 9, -100))
    ops = torch.ops.megarewarm
    for operator, given_ in (
        (ops.linear_cross_entropy.default, (hidden, weight, None, targets, 9, -100, 0.1, 16, torch.float32, False, True, True)),
        (ops.linear_cross_entropy.default, (hidden, weight, low, targets, 9, -100, 0.0, 4, torch.bfloat16, True, False, True)),
        (ops.logit_statistics.default, (logits, targets, 0, 9, -100)),
        (ops.logit_gradient_.default, (logits, targets, log_sum, at_target(log_sum, log_p, 0.1), 0, 9, -100, 0.1)),
    ):
        checks = torch.library.opcheck(operator, given_, test_utils=("test_schema", "test_faketensor"))
        assert set(checks.values()) == {"SUCCESS"}


def test_compiled_whole_with_z_loss() -> None:
    hidden, weight, targets = (x.detach() for x in inputs(8, 4, 10, torch.float32))

    def whole(x: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(x.tanh(), w, targets, z_loss=0.1)[0] * 2

    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(results(compiled, hidden, weight), results(whole, hidden, weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    logits = hidden @ weight.t()
    compiled_passes = torch.compile(passes, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled_passes(logits, targets + 10, 0.1), passes(logits, targets + 10, 0.1), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@given(
    tokens=st.integers(0, 100_000),
    rows=st.integers(1, 200_000),
    budget=st.integers(1, 2**34),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_chunks_in_place_are_large_equal_and_within_the_budget(tokens: int, rows: int, budget: int, dtype: torch.dtype) -> None:
    chunk = chunk_of(tokens, rows, dtype, budget)
    per_token = width_of(rows) * dtype.itemsize
    assert rows <= width_of(rows) < rows + 64 and 1 <= chunk <= max(1, tokens)
    assert chunk == 1 or chunk * per_token <= budget
    if tokens * per_token <= budget:
        assert chunk == max(1, tokens), "one chunk where it fits"
    elif chunk >= 16:
        assert chunk % 16 == 0
        most = budget // per_token // 16 * 16
        assert -(-tokens // chunk) <= -(-tokens // most) and chunk <= most, "no more chunks than the budget asks for"
        assert tokens - (-(-tokens // most) - 1) * chunk > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="here 'triton' is refused")
def test_the_choice_of_the_kernel() -> None:
    hidden, weight, targets = inputs(5, 3, 4, torch.float32)
    want, _ = linear_cross_entropy(hidden, weight, targets)
    assert torch.equal(linear_cross_entropy(hidden, weight, targets, kernel="reference")[0], want)
    with pytest.raises(ValueError, match="kernel is 'auto', 'triton' or 'reference', not 'fast'"):
        linear_cross_entropy(hidden, weight, targets, kernel="fast")
    with pytest.raises(ValueError, match=r"needs Triton, a CUDA device and at most fp32, got torch\.float32 on cpu"):
        linear_cross_entropy(hidden, weight, targets, kernel="triton")


class Buffers(TorchDispatchMode):
    """Keeps every tensor of a shape that has memory of its own."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape, self.found = shape, dict[int, Tensor]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.shape == self.shape:
            self.found[out.untyped_storage().data_ptr()] = out
        return out


@pytest.mark.parametrize("chunk", [16, 64])
def test_logits_exist_once_and_in_the_dtype_of_the_products(chunk: int) -> None:
    """The loop around the kernels: one buffer for all chunks, no logits in fp32."""
    hidden, weight, targets = arguments(64, 8, 192, 190, torch.bfloat16)
    with Buffers(chunk, 192) as seen, torch.no_grad():
        compute(hidden, weight, targets, 0, 190, -100, 0.1, chunk, torch.bfloat16, True, True)
    assert [(x.dtype, x.untyped_storage().nbytes()) for x in seen.found.values()] == [(torch.bfloat16, chunk * 192 * 2)]


def test_the_loss_of_many_chunks_has_all_its_digits() -> None:
    """One token a chunk: a sum in fp32 would be off by some 1e-6."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6000, 4, generator=generator), torch.randn(7, 4, generator=generator)
    targets = torch.randint(7, (6000,), generator=generator)
    logits = hidden.double() @ weight.double().t()
    wanted = float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    found, _ = linear_cross_entropy(hidden, weight, targets, memory_budget=1)
    assert float(found) == pytest.approx(wanted, rel=1.5e-7)
