"""The loss's Triton kernels on a device: errors against float64, the definition, and the same bits at every run."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from megarewarm_kernels import linear_cross_entropy
from megarewarm_kernels.loss.logit_passes import define_statistics, log_terms, logit_gradient_, logit_statistics

from tests.support.loss_cases import IGNORE, arguments, assert_as_exact_as_torch, by_torch, errors, results

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 8, 1, 1), (37, 24, 130, 121), (300, 64, 4097, 4097), (512, 128, 50304, 50277)]


@pytest.fixture(autouse=True)
def exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("budget", [2**31, 2**20])
@pytest.mark.parametrize(("tokens", "width", "rows", "valid"), SHAPES)
def test_as_exact_as_torch(
    tokens: int, width: int, rows: int, valid: int, budget: int, z_loss: float, dtype: torch.dtype
) -> None:
    assert_as_exact_as_torch(tokens, width, rows, valid, dtype, z_loss=z_loss, budget=budget, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("budget", [2**31, 2**22])
def test_twice_the_same_bits_and_near_the_definition(dtype: torch.dtype, budget: int) -> None:
    hidden, weight, targets = (x.cuda() for x in arguments(512, 64, 8192, 8100, dtype))
    asked: dict[str, Any] = {"valid_rows": 8100, "z_loss": 0.01, "memory_budget": budget}
    once, twice, plain = (
        results(
            partial(lambda kernel, h, w: linear_cross_entropy(h, w, targets, kernel=kernel, **asked)[0], kernel), hidden, weight
        )
        for kernel in ("triton", "auto", "reference")
    )
    assert all(torch.equal(one, other) for one, other in zip(once, twice, strict=True))
    # products of other sizes may add in another order, which moves some logits by a rounding
    assert max(errors(once, [x.cpu().double() for x in plain])) < max(8 * torch.finfo(dtype).eps, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [2**31, 2**22])
def test_a_known_upstream_gradient(dtype: torch.dtype, budget: int) -> None:
    """Three micro-batches, the weight's gradient added by the product: as near to float64 as autograd's way."""
    hidden, weight, targets = arguments(512, 64, 8192, 8100, dtype)
    asked: dict[str, Any] = {"valid_rows": 8100, "z_loss": 0.01}
    true = [
        3 * x for x in results(lambda h, w: by_torch(h, w, targets, valid=8100, z_loss=0.01), hidden.double(), weight.double())
    ]
    hidden, weight, targets = hidden.cuda(), weight.cuda(), targets.cuda()
    found = []
    for upstream in (torch.tensor(0.375, device="cuda"), None):
        states, head = hidden.clone().requires_grad_(), weight.float().requires_grad_()
        for _ in range(3):
            known: dict[str, Any] = {"low": head.detach().to(dtype), "memory_budget": budget, "upstream": upstream}
            loss, _ = linear_cross_entropy(states, head, targets, **asked, **known)
            (0.375 * loss).backward()
        assert states.grad is not None and head.grad is not None and not head.grad[8100:].any()
        found.append(errors([states.grad.cpu(), head.grad.cpu()], true[1:]))
    assert all(mine <= 1.2 * other + 1e-6 for mine, other in zip(*found, strict=True)), found


@pytest.mark.parametrize("known", [False, True])
def test_nothing_waits_for_the_device(known: bool) -> None:
    hidden, weight, targets = (x.cuda() for x in arguments(64, 64, 1024, 1000, torch.bfloat16))
    head, upstream = weight.float().requires_grad_(), torch.tensor(0.375, device="cuda") if known else None
    asked: dict[str, Any] = {"valid_rows": 1000, "z_loss": 0.01, "memory_budget": 2**16, "low": weight, "upstream": upstream}

    def step() -> None:
        loss, _ = linear_cross_entropy(hidden.clone().requires_grad_(), head, targets, **asked)
        (loss * 0.375).backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_offsets_beyond_two_to_the_31() -> None:
    """4 GiB of logits: the last row begins at element 2^31."""
    logits = torch.zeros(2**31 // 65536 + 1, 65536, dtype=torch.float16, device="cuda")
    last = torch.randn(65536, generator=torch.Generator().manual_seed(0)).half().cuda()
    logits[-1] = last
    targets = torch.full((len(logits),), IGNORE, device="cuda")
    targets[-1] = 7
    found = logit_statistics(logits, targets, 0, 65536, IGNORE)
    wanted = define_statistics(last[None], targets[-1:], 0, 65536, IGNORE)
    torch.testing.assert_close(found[:, -1:], wanted, rtol=1e-5, atol=1e-5)
    log_sum, log_p = log_terms(found)
    logit_gradient_(logits, targets, log_sum, torch.expm1(log_p), 0, 65536, IGNORE, 0.0)
    p = torch.softmax(last.float(), 0)
    p[7] -= 1
    torch.testing.assert_close(logits[-1].float(), p, rtol=2e-3, atol=1e-6)
    assert not logits[:-1].any()
