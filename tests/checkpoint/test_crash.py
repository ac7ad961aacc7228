"""Killed at any moment of a save, or with a full disk: the newest whole checkpoint loads, and training goes on from it."""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megarewarm.checkpoint.export.own import weights_only_state
from megarewarm.checkpoint.lineage import Lineage
from megarewarm.checkpoint.own import store
from megarewarm.checkpoint.own.folder import checkpoints_in, newest_whole
from megarewarm.checkpoint.own.integrity import find_damage
from megarewarm.checkpoint.own.retention import Retention
from megarewarm.checkpoint.own.saver import Saver
from megarewarm.checkpoint.own.state import TrainingState, read_state
from megarewarm.config.grid import Grid
from megarewarm.config.model import ModelConfig
from megarewarm.errors import UserError
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.trainer import train
from tests.support.distributed import run_ranks
from tests.support.tiny import config, events, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))
MODEL = ModelConfig(num_layers=1, hidden_size=8, num_heads=1, vocab_size=16, max_positions=8)


def state_of(step: int) -> TrainingState:
    return weights_only_state("crash", MODEL, Lineage()).model_copy(update={"step": step})


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    return {"model.a": torch.full((64, 3), float(step)), "model.b": torch.arange(5.0) * step, "rng.cpu": torch.tensor([step])}


def go_on(folder: Path, steps: int, *, asynchronous: bool = False) -> int:
    """What a restarted run does: load the newest whole checkpoint, check it, and save the next ``steps``. Returns the last."""
    newest, _ = newest_whole(folder)
    step = 0
    if newest is not None:
        step = read_state(newest).step
        assert newest.name == f"step_{step}"
        held = {name: torch.zeros_like(tensor) for name, tensor in tensors_of(0).items()}
        store.load(newest, held)
        for name, tensor in tensors_of(step).items():
            assert torch.equal(held[name], tensor), f"{newest}: {name}"
    with Saver(folder, Retention(keep_last=2, keep_every=Grid(10)), asynchronous=asynchronous) as saver:
        for _ in range(steps):
            step += 1
            saver.save(state_of(step), tensors_of(step))
        saver.wait()
    return step


def forked(action: Callable[..., object]) -> int:
    """Run ``action`` in a child process; its exit status as ``os.waitpid`` gives it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


# Every way in which a save touches the disk; each call is a moment before which, and after which, the process may die.
DISK = ["mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "open", "close"]


def die_at(moment: int) -> None:
    """Let this process kill itself by SIGKILL at the ``moment``-th operation on the disk from now, counted before and after."""
    left = moment

    def tick() -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            tick()
            result = function(*args, **kwargs)
            tick()
            return result

        return call

    for name in DISK:
        setattr(os, name, counted(getattr(os, name)))
    opened = builtins.open

    def open_counted(file, mode="r", *args, **kwargs):
        tick()
        stream = opened(file, mode, *args, **kwargs)
        if "w" in mode:
            write = stream.write

            def write_in_halves(data):
                # so that files are cut off in the middle as well
                half = len(data) // 2
                done = write(data[:half])
                stream.flush()
                tick()
                return done + write(data[half:])

            return stream if isinstance(stream, io.TextIOWrapper) else _Writing(stream, write_in_halves)
        return stream

    builtins.open = open_counted
    io.open = open_counted  # pathlib's


class _Writing:
    """A binary file whose ``write`` is another one."""

    def __init__(self, stream, write) -> None:
        self._stream, self.write = stream, write

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def __enter__(self):
        self._stream.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.__exit__(*error)


def count_moments(folder: Path) -> int:
    """How many moments two saves on top of two have."""
    low, high = 0, 4096
    go_on(folder, 2)
    while low < high:
        middle = (low + high) // 2
        copy = folder.with_name("probe")
        shutil.copytree(folder, copy)
        killed = os.WIFSIGNALED(forked(lambda at=middle, to=copy: (die_at(at), go_on(to, 2))))
        shutil.rmtree(copy)
        low, high = (middle + 1, high) if killed else (low, middle)
    return low


@pytest.mark.parametrize("apart", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_operation_on_the_disk(tmp_path: Path, apart: int) -> None:
    moments = count_moments(tmp_path / "counted")
    assert moments > 100, "the moments are no longer counted"
    folder = tmp_path / "run"
    last = go_on(folder, 2)
    deaths = 0
    for moment in range(0, moments, apart):
        status = forked(lambda at=moment: (die_at(at), go_on(folder, 2)))
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"moment {moment}: {status}"
        deaths += os.WIFSIGNALED(status)
        newest, notes = newest_whole(folder)
        assert newest is not None and notes == [], f"moment {moment}: {notes}"
        step = read_state(newest).step
        assert last <= step <= last + 2, f"moment {moment}: from {last} to {step}"
        last = step
        for _, checkpoint in checkpoints_in(folder):
            assert find_damage(checkpoint) is None, f"moment {moment}"
        kept = len([s for s, _ in checkpoints_in(folder) if s % 10 == 0])
        assert len(list(folder.iterdir())) <= kept + 5, f"moment {moment}: leftovers grow"
    assert deaths >= moments // apart - 5
    go_on(folder, 2)
    assert all(not entry.name.endswith(store.PARTIAL) for entry in folder.iterdir())


@pytest.mark.slow
def test_killed_at_random_times_with_saves_in_the_background(tmp_path: Path) -> None:
    """By the clock instead of by operations: 300 kills anywhere, the thread's work and the copying among it."""
    random.seed(4)
    folder, last = tmp_path / "run", 0
    for _ in range(300):
        child = os.fork()
        if child == 0:
            try:
                go_on(folder, 10_000, asynchronous=True)
            finally:
                os._exit(1)
        time.sleep(random.uniform(0.0, 0.12))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it ended by itself: a checkpoint did not load"
        newest, notes = newest_whole(folder)
        assert notes == []
        step = read_state(newest).step if newest is not None else 0
        assert step >= last
        last = step
    assert last > 300


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path]:
    """A file system of ``size`` bytes; skips where none can be mounted."""
    place.mkdir()
    if os.system(f"mount -t tmpfs -o size={size} tmpfs {place} 2>/dev/null") != 0:
        pytest.skip("a small file system can't be mounted here (not root)")
    try:
        yield place
    finally:
        os.system(f"umount {place}")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_loses_nothing_and_is_said(tmp_path: Path, asynchronous: bool) -> None:
    """Saves into less and less room: each time the error names the cause, and the checkpoint before it is whole."""
    with small_disk(tmp_path / "disk", 256 * 1024) as disk:
        folder, filler = disk / "checkpoints", disk / "filler"
        last = go_on(folder, 3)
        failures = 0
        for kilobytes in range(0, 256, 4):
            filler.unlink(missing_ok=True)
            try:
                filler.write_bytes(bytes(kilobytes * 1024))
            except OSError as error:
                assert error.errno == errno.ENOSPC
            try:
                last = go_on(folder, 1, asynchronous=asynchronous)
            except UserError as error:
                failures += 1
                assert f"step_{last + 1}: the checkpoint could not be written" in str(error) and "No space left" in str(error)
                assert "make room" in str(error)
            newest, notes = newest_whole(folder)
            assert newest == folder / f"step_{last}" and notes == []
            assert not list(folder.glob(f"*{store.PARTIAL}")), "what was written of it takes no room"
        assert failures > 10 and last > 10
        filler.unlink()
        assert go_on(folder, 1) == last + 1


def test_a_run_stops_when_the_disk_is_full_and_goes_on_when_it_is_not(tmp_path: Path) -> None:
    whole = train(config(tmp_path, folder=str(tmp_path / "whole")), ALONE, quiet())
    with small_disk(tmp_path / "disk", 2 * 1024 * 1024) as disk:
        run = config(tmp_path, folder=str(disk / "run"), checkpoint={"keep_last": 1})
        filler = disk / "filler"
        size = sum(f.stat().st_size for f in (whole.folder / "checkpoints/step_20").iterdir())
        filler.write_bytes(bytes(2 * 1024 * 1024 - 2 * size))
        with pytest.raises(UserError, match="No space left"):
            train(run, ALONE, quiet())
        newest, _ = newest_whole(disk / "run/checkpoints")
        assert newest is not None and read_state(newest).step < 20
        filler.unlink()
        outcome = train(run, ALONE, quiet())
        assert outcome.losses == whole.losses
        assert [line["step"] for line in events(outcome.folder, "save")][-1] == 20


def _run_into_a_full_disk(ranks: Ranks, place: str, disk: str, asynchronous: bool) -> str:
    changes = {"keep_last": 1, "asynchronous": asynchronous}
    try:
        train(config(Path(place), folder=f"{disk}/run", checkpoint=changes, parallel={"tensor": 2}), ranks, quiet())
    except UserError as error:
        return str(error)
    return "nothing was said"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_all_ranks_stop_together_when_the_disk_is_full(tmp_path: Path, asynchronous: bool) -> None:
    config(tmp_path)  # writes the token files before several ranks look for them
    with small_disk(tmp_path / "disk", 700 * 1024) as disk:
        said = run_ranks(_run_into_a_full_disk, 2, str(tmp_path), str(disk), asynchronous)
        assert all("the checkpoint could not be written" in each and "No space left" in each for each in said), said
        assert not list(disk.glob(f"run/checkpoints/*{store.PARTIAL}"))
