"""Head and loss as the tests see them: arguments at random, what PyTorch makes of them, and errors against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from megarewarm_kernels import linear_cross_entropy
from megarewarm_kernels.loss import logits_in_place
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100


def arguments(
    tokens: int, width: int, rows: int, valid: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a head of ``rows`` of which ``valid`` are classes, and targets, of which every fifth is none."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=random, dtype=torch.float64).to(dtype)
    weight = torch.randn(rows, width, generator=random, dtype=torch.float64).to(dtype)
    targets = torch.randint(valid, (tokens,), generator=random)
    targets[1::5] = IGNORE
    return hidden, weight, targets


def by_torch(hidden: Tensor, weight: Tensor, targets: Tensor, *, valid: int, z_loss: float = 0.0) -> Tensor:
    """What a user would write without us: products in the dtype of the arguments, the loss in fp32 or more."""
    logits = F.linear(hidden, weight[:valid])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    kept = logits[targets != IGNORE]
    return F.cross_entropy(logits, targets, reduction="sum") + z_loss * torch.logsumexp(kept, 1).square().sum()


def results(function: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor) -> list[Tensor]:
    """The loss and the gradients of both, for an upstream gradient that is not 1."""
    copies = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    loss = function(*copies)
    return [loss.detach(), *torch.autograd.grad(0.375 * loss, copies)]


def errors(found: list[Tensor], true: list[Tensor]) -> list[float]:
    """The relative error of each result, in the Euclidean norm."""
    return [float((f.to(t) - t).norm()) / (float(t.norm()) or 1.0) for f, t in zip(found, true, strict=True)]


def assert_as_exact_as_torch(
    tokens: int,
    width: int,
    rows: int,
    valid: int,
    dtype: torch.dtype,
    *,
    z_loss: float = 0.0,
    budget: int = 2**26,
    device: str = "cpu",
    kernel: str = "triton",
) -> list[tuple[float, float]]:
    """Errors against float64 at most twice those of PyTorch's own operations in the same dtype; gives back both."""
    hidden, weight, targets = arguments(tokens, width, rows, valid, dtype)
    true = results(lambda h, w: by_torch(h, w, targets, valid=valid, z_loss=z_loss), hidden.double(), weight.double())
    hidden, weight, targets = hidden.to(device), weight.to(device), targets.to(device)
    theirs = results(lambda h, w: by_torch(h, w, targets, valid=valid, z_loss=z_loss), hidden, weight)
    settings: dict[str, Any] = {"valid_rows": valid, "z_loss": z_loss, "memory_budget": budget, "kernel": kernel}
    ours = results(lambda h, w: linear_cross_entropy(h, w, targets, **settings)[0], hidden, weight)
    assert ours[0].dtype == torch.float32 and [g.dtype for g in ours[1:]] == [dtype] * 2
    assert [tuple(x.shape) for x in ours] == [(), (tokens, width), (rows, width)]
    assert not ours[2][valid:].any(), "padding rows get no gradient"
    assert not ours[1][targets == IGNORE].any(), "nor do tokens without a target"
    pairs = list(zip(errors(ours, true), errors(theirs, true), strict=True))
    for number, (mine, other) in enumerate(pairs):
        # the loss is fp32 in both: a few roundings of a sum, whichever of them is luckier
        rounding = 8 * torch.finfo(torch.float32).eps if number == 0 else torch.finfo(dtype).eps
        assert mine <= 2 * other + rounding, f"result {number}: error {mine:.3g}, torch has {other:.3g}"
    return pairs


@contextmanager
def in_place(*, direct: bool = True) -> Iterator[list[bool]]:
    """The loss in the form of a GPU, by its kernels' definitions; of its calls with a known gradient, whether they took it.
    Not ``direct``: none does."""
    calls: list[bool] = []
    takes = logits_in_place.takes_upstream

    def asked(weight: Tensor, dtype: torch.dtype) -> bool:
        calls.append(direct and takes(weight, dtype))
        return calls[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(logits_in_place, "applies", lambda *_: True)
        patched.setattr(logits_in_place, "takes_upstream", asked)
        yield calls
