"""Cross entropy and divergence from a teacher over a divided vocabulary: the undivided ones in float64, on several ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megarewarm_kernels import sharded_linear_cross_entropy, sharded_linear_distillation
from megarewarm_kernels.loss.linear_distillation import reference
from torch import Tensor

from megarewarm.parallel.ranks import Ranks
from tests.support.distributed import run_ranks
from tests.support.wire import Wire

# (tokens, ids, ids that the teacher knows, share, bytes of logits): padding on the last rank, all of it padding, none; chunks
CASES = [
    (13, 29, 29, 0.7, 2**20),
    (13, 29, 25, 1.0, 700),
    (8, 13, 13, 0.1, 500),
    (8, 20, 4, 3.0, 1),
    (0, 20, 20, 0.1, 1),
    (9, 5, 5, 0.0, 200),
]


def _problem(tokens: int, ids: int, ranks: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Hidden (t, 6), head, targets, and the teacher's (t, 5) and head, whose rows past ``ids`` are large."""
    random = torch.Generator().manual_seed(tokens + ids)
    rows = math.ceil(ids / ranks) * ranks
    states = [torch.randn(tokens, width, generator=random, dtype=torch.float64).to(dtype) for width in (6, 5)]
    heads = [torch.randn(rows, width, generator=random, dtype=torch.float64).to(dtype) for width in (6, 5)]
    for head in heads:
        head[ids:] = 1e3
    for each in states:
        each[::3] *= 1000  # exponentials of such logits overflow where the largest is not taken off first
    targets = torch.randint(ids, (tokens,), generator=random)
    targets[torch.rand(tokens, generator=random) < 0.3] = -100
    for each in states:
        each[targets == -100] = torch.nan  # what no loss may see
    return [states[0], heads[0], targets, states[1], heads[1]]


def _mine(ranks: Ranks, head: Tensor) -> Tensor:
    return head.chunk(ranks.world_size)[ranks.rank].clone()


def _apart(ranks: Ranks) -> int:
    """The losses, the gradient of hidden summed over ranks, and the gradient of this rank's rows, of each case."""
    for tokens, ids, known, share, budget in CASES:
        hidden, head, targets, taught, wanted_head = _problem(tokens, ids, ranks.world_size)
        options: dict[str, Any] = {"share": share, "teacher_rows": known}
        h, w = hidden.nan_to_num().requires_grad_(), head.clone().requires_grad_()
        total, parts, count = reference(h, w, targets, taught.nan_to_num(), wanted_head, valid_rows=ids, **options)
        wanted = [total.detach(), parts, count, *torch.autograd.grad(2 * total, [h, w])]
        wanted[4] = _mine(ranks, wanted[4])
        h, w = hidden.clone().requires_grad_(), _mine(ranks, head).requires_grad_()
        options |= {"group": dist.group.WORLD, "vocab_size": ids, "memory_budget": budget}
        total, parts, count = sharded_linear_distillation(h, w, targets, taught, _mine(ranks, wanted_head), **options)
        found = [total.detach(), parts, count, *torch.autograd.grad(2 * total, [h, w])]
        dist.all_reduce(found[3])
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    return len(CASES)


@pytest.mark.parametrize("world_size", [2, 4])
def test_equal_to_the_undivided_losses(world_size: int) -> None:
    assert run_ranks(_apart, world_size) == [len(CASES)] * world_size


def _details(ranks: Ranks) -> dict[str, Any]:
    hidden, head, targets, taught, wanted_head = _problem(16, 29, 2, torch.float32)
    hidden[targets == -100], taught[targets == -100] = 0, 0
    hidden[::3] /= 1000
    group = dist.group.WORLD
    assert group is not None
    mine, theirs = _mine(ranks, head), _mine(ranks, wanted_head)
    found: dict[str, Any] = {}

    def losses(h: Tensor, w: Tensor, *teacher: Tensor, **changes: Any) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"share": 0.7, "group": group, "vocab_size": 29} | changes
        states, rows = teacher or (taught, theirs)
        return sharded_linear_distillation(h, w, targets, states, rows, **options)[:2]

    with Wire() as wire:
        losses(hidden, mine)
        found["sent"] = wire.calls["_allgather_base_"], wire.most["_allgather_base_"], wire.calls["allreduce_"]
    live = [hidden.clone().requires_grad_(), mine.clone().requires_grad_()]
    total, parts = losses(live[0], live[1])
    once = [gradient.clone() for gradient in torch.autograd.grad(total, live, retain_graph=True)]
    twice = torch.autograd.grad(3 * total, live)
    found["again"] = max(float((b - 3 * a).abs().max()) for a, b in zip(once, twice, strict=True))
    with torch.no_grad():
        alone, _ = losses(live[0], live[1])
        found["no gradient"] = alone.requires_grad, float(alone - total.detach())
    (only,) = torch.autograd.grad(losses(hidden, live[1])[0], [live[1]])
    found["frozen"] = torch.equal(only, once[1]) and not parts.requires_grad
    # a model that is its teacher
    total, parts = losses(live[0], live[1], hidden, mine, share=5.0)
    plain = sharded_linear_cross_entropy(live[0], live[1], targets, group=group, vocab_size=29)[0]
    both = [torch.autograd.grad(each, live) for each in (total, plain)]
    found["itself"] = float(parts[1]), max(float((a - b).abs().max()) for a, b in zip(*both, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        low = losses(live[0], live[1])[1]
    found["autocast"] = bool(torch.equal(low, losses(live[0].detach().bfloat16(), live[1].detach().bfloat16())[1]))
    wrong: dict[str, Any] = {
        "size": lambda: losses(hidden, mine, vocab_size=33),
        "known": lambda: losses(hidden, mine, teacher_rows=30),
        "rows": lambda: losses(hidden, mine, taught, wanted_head),
        "kind": lambda: losses(hidden, mine, taught.long(), theirs),
    }
    for name, call in wrong.items():
        try:
            call()
        except ValueError as error:
            found[name] = str(error)
    return found


def test_exchange_second_backward_frozen_parts_and_errors() -> None:
    for found in run_ranks(_details, 2):
        assert found["sent"] == (1, 6 * 16 * 4, 1), "six numbers for each token, and one in all"
        assert found["again"] < 1e-4 and found["no gradient"] == (False, 0.0) and found["frozen"] and found["autocast"]
        assert found["itself"][0] == 0 and found["itself"][1] < 1e-4
        assert "vocab_size 33 does not lie in 1..15 rows x 2 ranks" in found["size"]
        assert "teacher_rows 30 does not lie in 1..29" in found["known"]
        assert "weight (15, g)" in found["rows"] and "'teacher_hidden' is torch.int64" in found["kind"]
