"""The loss's Triton kernels, run by Triton's interpreter on the CPU, in a process of their own (see tests/run)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megarewarm_kernels import linear_cross_entropy, sharded_linear_cross_entropy
from megarewarm_kernels.loss.logit_passes import log_terms, logit_gradient_, logit_statistics

from megarewarm.parallel.ranks import Ranks
from tests.support.distributed import run_ranks
from tests.support.loss_cases import IGNORE, arguments, assert_as_exact_as_torch, by_torch, errors, results

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="Triton decides at import: TRITON_INTERPRET=1 pytest -m interpreter"
    ),
    # of what lies in columns that align the rows of logits; the result is thrown away
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in (exp|subtract)"),
]

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.support import triton_interpreter

    triton_interpreter.repair()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def empty_is_nan() -> Iterator[None]:
    """Memory that nobody has written is NaN, not what happened to lie there."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize(
    ("tokens", "rows", "valid", "budget"),
    [(1, 1, 1, 1), (3, 2, 2, 2**26), (37, 130, 121, 40_000), (33, 257, 257, 1), (5, 4097, 4096, 2**26), (4, 9000, 8300, 2**26)],
)
def test_as_exact_as_torch(
    tokens: int, rows: int, valid: int, budget: int, z_loss: float, dtype: torch.dtype, empty_is_nan: None
) -> None:
    """Padding or none, a row in one block of columns or in three, chunks of one token, some, and all."""
    assert_as_exact_as_torch(tokens, 24, rows, valid, dtype, z_loss=z_loss, budget=budget)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    tokens=st.integers(0, 24),
    valid=st.integers(1, 200),
    padding=st.integers(0, 70),
    budget=st.sampled_from([1, 20_000, 2**26]),
    z_loss=st.sampled_from([0.0, 1e-4, 0.1]),
    turned=st.booleans(),
)
def test_any_shape(tokens: int, valid: int, padding: int, budget: int, z_loss: float, turned: bool) -> None:
    hidden, weight, targets = arguments(tokens, 7, valid + padding, valid, torch.float32)
    true = results(lambda h, w: by_torch(h, w, targets, valid=valid, z_loss=z_loss), hidden.double(), weight.double())
    if turned:
        hidden, weight = hidden.t().contiguous().t(), weight.t().contiguous().t()
        targets = torch.stack([targets, targets + 1], 1)[:, 0]
    asked: dict[str, Any] = {"valid_rows": valid, "z_loss": z_loss, "memory_budget": budget}
    found = results(lambda h, w: linear_cross_entropy(h, w, targets, **asked)[0], hidden, weight)
    for mine, wanted in zip(found, true, strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("ignored", ["all", "none"])
@pytest.mark.parametrize("tokens", [0, 5])
def test_no_token_at_all(tokens: int, ignored: str, empty_is_nan: None) -> None:
    hidden, weight, targets = arguments(tokens, 6, 70, 66, torch.bfloat16)
    targets = targets.fill_(IGNORE) if ignored == "all" else targets.clamp(min=0)
    loss, *gradients = results(lambda h, w: linear_cross_entropy(h, w, targets, valid_rows=66)[0], hidden, weight)
    if tokens and ignored == "none":
        assert loss > 0 and all(gradient[0].any() for gradient in gradients)
    else:
        assert loss == 0 and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    hidden, weight, targets = arguments(9, 6, 70, 70, torch.float32)
    whole = results(lambda h, w: linear_cross_entropy(h, w, targets)[0], hidden, weight)
    hidden.requires_grad_(frozen == "weight"), weight.requires_grad_(frozen == "hidden")
    loss, _ = linear_cross_entropy(hidden, weight, targets)
    assert loss.detach() == whole[0] and loss.requires_grad == (frozen != "both")
    if frozen != "both":
        (0.375 * loss).backward()
        alive, wanted = (weight, whole[2]) if frozen == "hidden" else (hidden, whole[1])
        assert alive.grad is not None and torch.equal(alive.grad, wanted)


def test_a_sure_answer_keeps_its_small_gradient() -> None:
    """Where p is nearly 1, p - 1 must not be computed as a difference of rounded numbers."""
    for gap in (5.0, 10.0, 13.0):
        weight = torch.tensor([[1.0], [0.0]])
        exact = -gap / (1 + torch.tensor(gap, dtype=torch.float64).exp())
        *_, found = results(lambda h, w: linear_cross_entropy(h, w, torch.tensor([0]))[0], torch.tensor([[gap]]), weight)
        assert found[0].item() == pytest.approx(0.375 * exact.item(), rel=1e-5, abs=gap * 6e-8)


@pytest.mark.parametrize("ignore", [IGNORE, 12])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_passes_touch_nothing_but_their_rows(dtype: torch.dtype, ignore: int) -> None:
    """Classes 10..80 of a vocabulary, in rows of 75 columns, 5 of them padding of NaN, with bands of NaN between the rows."""
    random = torch.Generator().manual_seed(3)
    band = torch.full((9, 120), float("nan"), dtype=dtype)
    logits = band[2:7, 20:95]
    logits[:, :70] = 4 * torch.randn(5, 70, generator=random).to(dtype)
    # the first class, the last, before them, behind them where a padding column lies, and a class that may mean "no target"
    targets = torch.tensor([10, 79, 9, 81, 12])
    wide = logits[:, :70].double()
    found = logit_statistics(logits, targets, 10, 70, ignore)
    z = torch.stack([wide[0, 0], wide[1, 69], wide[4, 2] * (ignore != 12)])
    torch.testing.assert_close(found[0].double(), wide.amax(1), rtol=0, atol=0)
    torch.testing.assert_close(found[0] + found[1].log(), torch.logsumexp(wide, 1).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[2], torch.stack([z[0], z[1], 0 * z[0], 0 * z[0], z[2]]).float(), rtol=0, atol=0)

    log_sum, log_p = log_terms(found)
    wanted = torch.softmax(wide, 1) * (1 + 0.02 * torch.logsumexp(wide, 1))[:, None]
    for row, column in ((0, 0), (1, 69), (4, 2)):
        wanted[row, column] -= 1
    if ignore == 12:
        wanted[4] = 0
    before, eps = band.clone(), torch.finfo(dtype).eps
    special = torch.expm1(log_p) + 0.02 * log_sum * log_p.exp()
    logit_gradient_(logits, targets, log_sum, special, 10, 70, ignore, 0.01)
    torch.testing.assert_close(logits[:, :70].double(), wanted, rtol=max(eps, 2e-6), atol=max(eps * 2**-6, 1e-7))
    assert not logits[:, 70:].any(), "padding columns get a gradient of 0"
    before[2:7, 20:95] = logits
    assert torch.equal(before.view(torch.uint8), band.view(torch.uint8)), "the surroundings are unchanged"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_is_multiplied_before_it_is_rounded(dtype: torch.dtype) -> None:
    """By a power of two the bits of what is multiplied afterwards, where the numbers stay within the dtype's normal ones."""
    logits = (2 * torch.randn(5, 4100, generator=torch.Generator().manual_seed(0))).to(dtype)
    targets = torch.tensor([0, 4099, IGNORE, 3, 4096])
    log_sum, log_p = log_terms(logit_statistics(logits, targets, 0, 4100, IGNORE))
    plain, large, odd = (logits.clone() for _ in range(3))
    for each, upstream in ((plain, None), (large, torch.tensor(64.0)), (odd, torch.tensor(3e-3))):
        logit_gradient_(each, targets, log_sum, torch.expm1(log_p), 0, 4100, IGNORE, 0.0, upstream)
    small = plain.abs() <= torch.finfo(dtype).smallest_normal
    assert torch.equal(large.masked_fill(small, 0), (plain * 64).masked_fill(small, 0)) and plain[4].any()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(odd.double(), 3e-3 * plain.double(), rtol=eps, atol=2**-24 if dtype == torch.float16 else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "valid", "budget"), [(130, 121, 2**26), (257, 257, 16 * 320 * 2)])
def test_a_known_upstream_gradient(dtype: torch.dtype, rows: int, valid: int, budget: int, empty_is_nan: None) -> None:
    """The weight's gradient of two micro-batches is added where it lies; one chunk: autograd's bits, by a power of two."""
    hidden, weight, targets = arguments(37, 24, rows, valid, dtype)
    asked: dict[str, Any] = {"valid_rows": valid, "z_loss": 0.01, "memory_budget": budget, "low": weight}
    found = []
    for upstream in (torch.tensor(2.0**-9), None):
        states, head = hidden.clone().requires_grad_(), weight.float().requires_grad_()
        for _ in range(2):
            loss, _ = linear_cross_entropy(states, head, targets, upstream=upstream, **asked)
            assert upstream is None or head.grad is not None
            (loss * 2.0**-9).backward()
        assert states.grad is not None and head.grad is not None and not head.grad[valid:].any()
        found.append([states.grad, head.grad])
    for mine, other in zip(*found, strict=True):
        if budget == 2**26:
            assert torch.equal(mine, other)
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4 * float(other.abs().max()))


def test_guard_bands_around_the_arguments() -> None:
    hidden, weight, targets = arguments(19, 8, 130, 125, torch.float32)
    bands, guarded = [], []
    for argument in (hidden, weight):
        band = torch.full((argument.numel() + 1024,), float("nan"))
        band[512 : 512 + argument.numel()] = argument.flatten()
        bands.append(band)
        guarded.append(band[512 : 512 + argument.numel()].view(argument.shape))
    before = [band.clone() for band in bands]
    around = torch.full((len(targets) + 64,), 2**40)
    around[32:-32] = targets
    asked: dict[str, Any] = {"valid_rows": 125, "z_loss": 0.1}
    found = results(lambda h, w: linear_cross_entropy(h, w, around[32:-32], **asked)[0], *guarded)
    wanted = results(lambda h, w: linear_cross_entropy(h, w, targets, **asked)[0], hidden, weight)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(before, bands, strict=True))


def test_offsets_beyond_two_to_the_31() -> None:
    """Rows 2^30 elements apart, of which only a few pages are ever touched: the third begins at element 2^31."""
    near = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).half()
    far = torch.empty(2 * 2**30 + 64, dtype=torch.float16).as_strided((3, 64), (2**30, 1))
    far.copy_(near)
    targets = torch.tensor([3, IGNORE, 63])
    found = logit_statistics(far, targets, 0, 64, IGNORE)
    assert torch.equal(found, logit_statistics(near, targets, 0, 64, IGNORE))
    log_sum, log_p = log_terms(found)
    for logits in (near, far):
        logit_gradient_(logits, targets, log_sum, torch.expm1(log_p), 0, 64, IGNORE, 0.0)
    assert torch.equal(far, near) and near[2].any() and not near[1].any()


def test_compiled_whole() -> None:
    hidden, weight, targets = arguments(5, 6, 70, 70, torch.float32)

    def function(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(h.tanh(), w, targets, z_loss=0.1)[0] * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for one, other in zip(results(compiled, hidden, weight), results(function, hidden, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


SHARDED = [(torch.float32, 135), (torch.bfloat16, 135), (torch.bfloat16, 65)]


def _sharded(ranks: Ranks) -> list[tuple[list[float], list[float]]]:
    """Errors, for this rank's part, of Triton and of the definition over two ranks with 70 rows of the head each."""
    torch.use_deterministic_algorithms(True)  # memory that nobody has written is NaN
    group, part = torch.distributed.group.WORLD, slice(70 * ranks.rank, 70 * ranks.rank + 70)

    def of(kernel: str, dtype: torch.dtype, classes: int) -> list[float]:
        hidden, weight, targets = arguments(21, 12, 140, classes, dtype)
        true = results(lambda h, w: by_torch(h, w, targets, valid=classes, z_loss=0.1), hidden.double(), weight.double())
        asked: dict[str, Any] = {"group": group, "vocab_size": classes, "z_loss": 0.1, "memory_budget": 8000, "kernel": kernel}
        found = results(lambda h, w: sharded_linear_cross_entropy(h, w, targets, **asked)[0], hidden, weight[part])
        found[1] = found[1].float()
        torch.distributed.all_reduce(found[1])
        return errors(found, [true[0], true[1], true[2][part]])

    return [(of("triton", *case), of("reference", *case)) for case in SHARDED]


def test_over_two_ranks() -> None:
    """Of the second rank's rows some are padding, or all."""
    for pairs in run_ranks(_sharded, 2):
        for (dtype, _), (triton, reference) in zip(SHARDED, pairs, strict=True):
            assert all(mine <= 2 * other + 2**-20 for mine, other in zip(triton, reference, strict=True)), (triton, reference)
            assert max(reference) < 2 * torch.finfo(dtype).eps + 2**-21
