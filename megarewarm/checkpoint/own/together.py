"""What ranks that work on one checkpoint tell each other: results, and failures that must stop all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def position(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """(rank, ranks) of this process; (0, 1) where it is alone."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The ``value`` of every rank, in their order. All ranks call it."""
    _, ranks = position(group)
    if ranks == 1:
        return [value]
    found: list[T | None] = [None] * ranks
    dist.all_gather_object(found, value, group=group)
    return found  # type: ignore[return-value]


def together(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """What ``action`` returns on every rank. An ``OSError`` on any of them is raised on all of them, with its words."""
    mine: tuple[T | None, str | None]
    try:
        mine = action(), None
    except OSError as error:
        mine = None, str(error)
        if position(group)[1] == 1:
            raise
    found = gather(mine, group)
    for rank, (_, problem) in enumerate(found):
        if problem is not None:
            raise OSError(f"{problem}, on rank {rank}")
    return [value for value, _ in found]  # type: ignore[misc]
