"""Numbers and decisions that all ranks must share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

Between = Callable[[int, int], None]
"""Called by all ranks alike between two portions of work: (how many are done, of how many). It may raise to break off."""


def nothing_between(done: int, portions: int) -> None:
    """A ``Between`` that lets the work go on."""


def all_reduce_sums(values: Sequence[float]) -> list[float]:
    """The sums of ``values`` over all ranks, added in float64."""
    return _all_reduce(values, dist.ReduceOp.SUM)


def all_reduce_maxima(values: Sequence[float]) -> list[float]:
    """The largest of each of ``values`` on any rank."""
    return _all_reduce(values, dist.ReduceOp.MAX)


def _all_reduce(values: Sequence[float], how: dist.ReduceOp.RedOpType) -> list[float]:
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return list(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(total, op=how)
    return [float(value) for value in total.tolist()]
