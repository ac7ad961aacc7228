"""Whether all ranks enter the same functions of those that are marked ``@collective``, in the same order.

Each rank leaves word of what it enters in the store and reads what the others have entered, before any of them could wait for
a message that never comes.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from megarewarm.parallel import collective

Entered = dict[str, list[str]]
"""The functions that a rank has entered, by thread: saving has one of its own."""


@contextmanager
def compared(patience: float = 30.0) -> Iterator[Entered]:
    """Compare the ranks in this block, which all of them enter.

    A rank that enters another function than the others, or waits ``patience`` seconds for one to enter its own, gets an
    ``AssertionError`` that names both.
    """
    entered: Entered = defaultdict(list)
    store, me = dist.distributed_c10d._get_default_store(), dist.get_rank()

    def watch(name: str) -> None:
        thread = threading.current_thread().name
        mine = entered[thread]
        mine.append(name)
        place = f"collective/{thread}/{len(mine)}"
        store.set(f"{place}/{me}", name)
        for other in range(dist.get_world_size()):
            try:
                store.wait([f"{place}/{other}"], timedelta(seconds=patience))
            except RuntimeError as error:
                last = f" (its last was {mine[-2]})" if len(mine) > 1 else ""
                raise AssertionError(f"rank {me} enters {name}, rank {other} enters nothing{last}") from error
            theirs = store.get(f"{place}/{other}").decode()
            assert theirs == name, f"rank {me} enters {name}, rank {other} enters {theirs}: call {len(mine)} of {thread}"

    collective.watch = watch
    try:
        yield entered
    finally:
        collective.watch = None
