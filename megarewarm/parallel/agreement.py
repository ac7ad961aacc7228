"""Agreement between ranks: numbers, results, and failures that must stop all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from megarewarm.errors import UserError
from megarewarm.parallel.collective import collective

T = TypeVar("T")
Between = Callable[[int, int], None]
"""Called on all ranks alike between two portions of work with (portions done, of how many). It may raise to interrupt the
work."""


def nothing_between(done: int, portions: int) -> None:
    """A ``Between`` that lets the work go on."""


def position(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """(rank, ranks) of this process; (0, 1) where it is alone."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


@collective
def all_reduce_sums(values: Sequence[float]) -> list[float]:
    """The sums of ``values`` over all ranks, added in float64. All ranks call it."""
    return _all_reduce(values, dist.ReduceOp.SUM)


@collective
def all_reduce_maxima(values: Sequence[float]) -> list[float]:
    """The largest of each of ``values`` on any rank. All ranks call it."""
    return _all_reduce(values, dist.ReduceOp.MAX)


def _all_reduce(values: Sequence[float], how: dist.ReduceOp.RedOpType) -> list[float]:
    if position()[1] == 1:
        return list(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(total, op=how)
    return [float(value) for value in total.tolist()]


@collective
def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The ``value`` of every rank, in their order. All ranks call it."""
    _, ranks = position(group)
    if ranks == 1:
        return [value]
    found: list[T | None] = [None] * ranks
    dist.all_gather_object(found, value, group=group)
    return found  # type: ignore[return-value]


@collective
def on_all_ranks(
    action: Callable[[], T] | None, error: type[OSError] | type[UserError], group: dist.ProcessGroup | None = None
) -> T | None:
    """The result of ``action`` on this rank; None on ranks without an action. All ranks call it. An ``error`` on any rank is
    raised on all of them: the first rank's, with its number unless all ranks with an action failed alike."""
    result: T | None = None
    problem: OSError | UserError | None = None
    try:
        result = action() if action is not None else None
    except error as raised:
        problem = raised
    told = gather((action is not None, problem), group)
    for rank, (_, first) in enumerate(told):
        if first is not None:
            alike = all(str(other) == str(first) for acts, other in told if acts)
            raise (problem or first) if alike else error(f"{first}, on rank {rank}")
    return result
