"""No rank waits for another for longer than parallel.timeout_minutes: not in any of its groups, not at a frozen store."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megarewarm.parallel import ranks as ranks_module
from megarewarm.parallel.mesh import Layout, Mesh
from megarewarm.parallel.ranks import Ranks, is_rank_loss
from tests.support.distributed import run_ranks

PATIENCE = 2.0
LAYOUTS = [
    Layout(tensor=2, shard=2),
    Layout(pipeline=2, replicate=2),
    pytest.param(Layout(replicate=2, shard=2), marks=pytest.mark.slow),
]


def _wait_in_every_group(ranks: Ranks, layout: Layout) -> list[tuple[str, str, float]]:
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=PATIENCE))
    mesh = Mesh(ranks, layout)
    shard = mesh.submesh("shard").get_group() if layout.shard > 1 else None
    groups = {
        "tensor": mesh.tensor,
        "pipeline": mesh.pipeline,
        "way back": mesh.reverse_group,
        "data": mesh.data,
        "shard": shard,
    }
    if layout.replicate > 1 and layout.shard > 1:
        groups["replicate"] = mesh.submesh("replicate").get_group()
    found = []
    for name, group in groups.items():
        if group is None:
            continue
        began, said = time.monotonic(), "nothing"
        if ranks.rank != 3:  # which is silent in each of its groups
            try:
                if "pipeline" in name or "way" in name:  # where ranks send to one another
                    peer = 1 - dist.get_rank(group)
                    sent = dist.isend(torch.zeros(1), group=group, group_dst=peer)
                    dist.recv(torch.zeros(1), group=group, group_src=peer)
                    assert sent is not None
                    sent.wait()
                else:
                    dist.all_reduce(torch.zeros(1), group=group)
            except RuntimeError as error:
                said = "lost" if is_rank_loss(error) else str(error)
            found.append((name, said, time.monotonic() - began))
    if ranks.rank == 3:
        time.sleep(6 * PATIENCE)
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_group_waits_as_long_as_all_ranks_do(layout: Layout) -> None:
    answers = run_ranks(_wait_in_every_group, 4, layout)
    lost = [name for answer in answers for name, said, _ in answer if said == "lost"]
    assert lost and all(said in ("lost", "nothing") for answer in answers for _, said, _ in answer), answers
    assert max(seconds for answer in answers for _, _, seconds in answer) < 5 * PATIENCE, answers
    expected = {
        *(["tensor"] if layout.tensor > 1 else []),
        *(["pipeline", "way back"] if layout.pipeline > 1 else []),
        *(["data"] if layout.data > 1 else []),
        *(["shard"] if layout.shard > 1 else []),
    }
    assert expected <= set(lost)


def test_a_loss_within_a_pipelines_stage_is_known_by_its_cause() -> None:
    try:
        try:
            raise RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:41842")
        except RuntimeError as error:
            raise RuntimeError("Failed to run stage backward: Stage output: ('Tensor(torch.Size([2, 16, 32]))',)") from error
    except RuntimeError as error:
        assert is_rank_loss(error)
    assert not is_rank_loss(RuntimeError("Failed to run stage backward: a defect"))
    assert not is_rank_loss(OSError("Connection timed out")) and not is_rank_loss(None)


class FrozenStore:
    """The store of a rank that was stopped: what is sent to it goes, an answer never comes."""

    def set(self, key: str, value: str) -> None:
        """Nothing is heard of it."""

    def check(self, keys: list[str]) -> bool:
        """Wait for an answer."""
        threading.Event().wait()
        return True


def test_a_store_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "_STORE_PATIENCE", 0.2)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    store: dist.Store = FrozenStore()  # type: ignore[assignment]
    began = time.monotonic()
    assert Ranks(1, 2, torch.device("cpu"), store=store).give_up(patience=0) == (
        "rank 0, which holds the store and does not answer"
    )
    assert time.monotonic() - began < 10


def test_who_held_a_store_that_is_gone_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's agent holds it, where there is one: then no rank is accused."""

    class Gone(FrozenStore):
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("Broken pipe")

    store: dist.Store = Gone()  # type: ignore[assignment]
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    ranks = Ranks(1, 2, torch.device("cpu"), store=store)
    assert ranks.give_up() == "rank 0, which held the store and is gone"
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert ranks.give_up() == "the launcher, which held the store and is gone"
