"""Ranks lost while a checkpoint is written or read: who is frozen is not waited for, a slow disk is, no checkpoint is
blamed."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from megarewarm.checkpoint.own import saver, store
from megarewarm.checkpoint.own.folder import newest_whole
from megarewarm.checkpoint.own.retention import Retention
from megarewarm.checkpoint.own.saver import Saver
from megarewarm.errors import UserError
from megarewarm.parallel.ranks import Ranks, is_rank_loss
from tests.checkpoint.test_crash import go_on, state_of, tensors_of
from tests.support.distributed import run_ranks

SILENCE = 3.0  # seconds, what parallel.timeout_minutes is to a run


def _slowly(ranks: Ranks, folder: str, asynchronous: bool) -> float:
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=SILENCE))
    write = saver.write

    def slow(*args: object) -> None:
        time.sleep(2 * SILENCE * ranks.rank)
        write(*args)  # type: ignore[arg-type]

    saver.write = slow  # type: ignore[assignment]
    began = time.monotonic()
    with Saver(Path(folder), Retention(1), asynchronous=asynchronous) as saving:
        saving.save(state_of(1), tensors_of(1))
        saving.wait()
        assert [saved.step for saved in saving.finished()] == [1]
    return time.monotonic() - began


def _frozen(ranks: Ranks, folder: str, asynchronous: bool) -> str:
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=SILENCE))
    place, write = Path(folder), saver.write
    (place / f"pid.{ranks.rank}").write_text(str(os.getpid()))

    def freezes(*args: object) -> None:
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        write(*args)  # type: ignore[arg-type]

    saver.write = freezes  # type: ignore[assignment]
    began, said = time.monotonic(), "nothing was noticed"
    try:
        with Saver(place / "checkpoints", Retention(1), asynchronous=asynchronous) as saving:
            saving.save(state_of(1), tensors_of(1))
            saving.wait()
    except RuntimeError as error:
        said = f"lost after {time.monotonic() - began:.1f} s" if is_rank_loss(error) else str(error)
    if ranks.rank == 0:
        os.kill(int((place / "pid.1").read_text()), signal.SIGCONT)
    return said


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_may_be_slower_than_a_rank_may_be_silent(tmp_path: Path, asynchronous: bool) -> None:
    seconds = run_ranks(_slowly, 2, str(tmp_path), asynchronous)
    assert min(seconds) > 2 * SILENCE
    newest, notes = newest_whole(tmp_path)
    assert newest == tmp_path / "step_1" and notes == []


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rank_that_freezes_during_a_save_is_noticed_in_time(tmp_path: Path, asynchronous: bool) -> None:
    said, _ = run_ranks(_frozen, 2, str(tmp_path), asynchronous)
    assert said.startswith("lost after"), said
    assert float(said.split()[2]) < 10 * SILENCE


def _dies_while_loading(ranks: Ranks, folder: str) -> str:
    place = Path(folder)
    read = dcp.load

    def dies(*args: object, **kwargs: object) -> None:
        if ranks.rank == 1:
            dist.destroy_process_group()  # closes the connections, as the end of its process does
        read(*args, **kwargs)

    dcp.load = dies
    try:
        store.load(place / "step_1", tensors_of(0))
    except UserError as error:
        return f"blamed: {error}"
    except RuntimeError as error:
        return "lost" if is_rank_loss(error) else str(error)
    return "nothing was noticed"


def test_a_rank_that_dies_while_a_checkpoint_is_read_is_no_fault_of_the_checkpoint(tmp_path: Path) -> None:
    go_on(tmp_path, 1)
    assert run_ranks(_dies_while_loading, 2, str(tmp_path))[0] == "lost"
