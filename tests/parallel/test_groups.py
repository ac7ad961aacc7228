"""A rank that dies while the others make a group with it is missed after the time that was set for all ranks."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megarewarm.parallel.groups import new_groups, new_patient_group, patience
from megarewarm.parallel.mesh import Layout, ranks_along
from megarewarm.parallel.ranks import Ranks, is_rank_loss
from tests.support.distributed import run_ranks


def _make(ranks: Ranks, kind: str) -> float | None:
    """Seconds until rank 0 has given up making a group with rank 1, which doesn't."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3))
    assert patience() == timedelta(seconds=3)
    later = new_patient_group(timedelta(hours=2))
    assert later._get_backend(torch.device("cpu")).options._timeout == timedelta(hours=2)
    if ranks.rank == 1:
        time.sleep(12)
        return None
    began = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        new_patient_group(timedelta(hours=2)) if kind == "patient" else new_groups([[0, 1]])
    assert is_rank_loss(caught.value)
    return time.monotonic() - began


@pytest.mark.parametrize("kind", ["patient", "usual"])
def test_a_rank_that_does_not_come_to_a_group_is_missed_in_time(kind: str) -> None:
    seconds = run_ranks(_make, 2, kind)[0]
    assert 2 < seconds < 11


def _numbers(ranks: Ranks, layout: Layout) -> list[list[int]]:
    return [
        dist.get_process_group_ranks(group)
        for axes in (("pipeline",), ("replicate", "shard"), ("tensor",))
        if (group := new_groups(ranks_along(layout.grid, *axes))) is not None
    ]


def test_each_rank_gets_its_own_groups() -> None:
    found = run_ranks(_numbers, 4, Layout(2, 1, 1, 2))
    assert found == [[[0, 2], [0], [0, 1]], [[1, 3], [1], [0, 1]], [[0, 2], [2], [2, 3]], [[1, 3], [3], [2, 3]]]
    assert ranks_along(Layout(2, 2, 2, 1).grid, "replicate", "shard") == [[0, 1, 2, 3], [4, 5, 6, 7]]
