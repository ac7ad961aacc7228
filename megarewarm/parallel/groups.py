"""Process groups that inherit the main timeout, also while they are made. torch gives a new group its own half hour, in
which nothing notices that a rank has died while the others connect to it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from megarewarm.parallel.collective import collective


def patience() -> timedelta:
    """How long the ranks of the default group wait for each other (``parallel.timeout_minutes``)."""
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    found: timedelta = dist.distributed_c10d._get_default_group()._get_backend(device).options._timeout
    return found


@collective
def new_groups(members: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
    """A group of each of ``members``, which are ranks; the one that this rank is in. All ranks call it with the same lists."""
    mine: dist.ProcessGroup | None = None
    for ranks in members:
        group = dist.new_group(list(ranks), timeout=patience())
        if dist.get_rank() in ranks:
            mine = group
    return mine


@collective
def new_patient_group(later: timedelta) -> dist.ProcessGroup:
    """A gloo group of all ranks that, once it is made, waits for ``later``. All ranks call it."""
    group = dist.new_group(backend="gloo", timeout=patience())
    dist.distributed_c10d._set_pg_timeout(later, group)
    return group
