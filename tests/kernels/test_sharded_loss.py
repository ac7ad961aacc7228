"""The head and loss over a divided vocabulary: equal to the undivided one, on two and four ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megarewarm_kernels import sharded_linear_cross_entropy
from torch import Tensor

from megarewarm.parallel.ranks import Ranks
from tests.support.distributed import run_ranks
from tests.support.loss_cases import IGNORE, arguments, by_torch, results
from tests.support.wire import Wire

# (tokens, classes, rows of the head, z-loss, bytes of logits): padding on the last rank, all of it padding, none; chunks
CASES = [(13, 29, 32, 0.0, 2**20), (13, 29, 32, 0.1, 300), (8, 13, 20, 0.1, 500), (8, 20, 20, 1e-4, 1), (0, 20, 20, 0.1, 1)]


def _part(ranks: Ranks, weight: Tensor) -> slice:
    rows = math.ceil(len(weight) / ranks.world_size)
    return slice(ranks.rank * rows, ranks.rank * rows + rows)


def _apart(ranks: Ranks) -> int:
    """In float64: the loss, the gradient of hidden summed over ranks, and the gradient of this rank's rows, of each case."""
    for tokens, classes, rows, z_loss, budget in CASES:
        hidden, weight, targets = arguments(tokens, 6, rows, classes, torch.float64)
        hidden[::3] *= 1000  # exponentials of such logits overflow where the largest is not taken off first
        asked: dict[str, Any] = {"group": dist.group.WORLD, "vocab_size": classes, "z_loss": z_loss, "memory_budget": budget}
        wanted = results(lambda h, w: by_torch(h, w, targets, valid=classes, z_loss=z_loss), hidden, weight)  # noqa: B023
        wanted[2] = wanted[2][_part(ranks, weight)]
        mine = weight[_part(ranks, weight)]
        found = results(lambda h, w: sharded_linear_cross_entropy(h, w, targets, **asked)[0], hidden, mine)  # noqa: B023
        dist.all_reduce(found[1])
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    return len(CASES)


@pytest.mark.parametrize("world_size", [2, 4])
def test_equal_to_the_undivided_loss(world_size: int) -> None:
    assert run_ranks(_apart, world_size) == [len(CASES)] * world_size


def _details(ranks: Ranks) -> dict[str, Any]:
    hidden, weight, targets = arguments(16, 6, 32, 29, torch.float32)
    mine = weight[_part(ranks, weight)]
    group = dist.group.WORLD
    assert group is not None
    found: dict[str, Any] = {}

    def loss(h: Tensor, w: Tensor, **changes: Any) -> Tensor:
        options: dict[str, Any] = {"group": group, "vocab_size": 29} | changes
        return sharded_linear_cross_entropy(h, w, targets, **options)[0]

    with Wire() as wire:
        loss(hidden, mine, memory_budget=16 * 16 * 4)
        found["one chunk"] = wire.calls["_allgather_base_"], wire.most["_allgather_base_"]
    with Wire() as wire:
        loss(hidden, mine, memory_budget=16 * 4 * 4)
        found["four chunks"] = wire.calls["_allgather_base_"], wire.most["_allgather_base_"]

    live = [hidden.clone().requires_grad_(), mine.clone().requires_grad_()]
    value = loss(*live)
    once = [gradient.clone() for gradient in torch.autograd.grad(value, live, retain_graph=True)]
    twice = torch.autograd.grad(3 * value, live)
    found["again"] = max(float((b - 3 * a).abs().max()) for a, b in zip(once, twice, strict=True))
    with torch.no_grad():
        found["no gradient"] = loss(*live).requires_grad, float(loss(*live) - value.detach())
    only = loss(hidden, live[1])
    (alone,) = torch.autograd.grad(only, [live[1]])
    found["frozen"] = torch.equal(alone, once[1])
    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = float(loss(*live).detach() - loss(hidden.bfloat16(), mine.bfloat16()))
    _, count = sharded_linear_cross_entropy(hidden, mine, targets, group=group, vocab_size=29)
    found["count"] = int(count) == int((targets != IGNORE).sum())
    refused: dict[str, dict[str, Any]] = {
        "size": {"vocab_size": 33},
        "kernel": {"kernel": "fast"},
        "triton": {"kernel": "triton"},
    }
    for name, change in refused.items():
        try:
            loss(hidden, mine, **change)
        except ValueError as error:
            found[name] = str(error)
    return found


def test_exchange_second_backward_frozen_parts_and_errors() -> None:
    for found in run_ranks(_details, 2):
        assert found["one chunk"] == (1, 3 * 16 * 4) and found["four chunks"] == (4, 3 * 4 * 4), "three numbers for each token"
        assert found["again"] < 1e-5 and found["no gradient"] == (False, 0.0) and found["frozen"] and found["count"]
        assert found["autocast"] == 0
        assert "vocab_size 33 does not lie in 1..16 rows x 2 ranks" in found["size"]
        assert "not 'fast'" in found["kernel"] and "kernel 'triton' needs" in found["triton"]
