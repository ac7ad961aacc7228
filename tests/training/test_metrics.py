"""What befalls the files of a run while it trains: full disks are named once, TensorBoard never ends a run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megarewarm.config.execution import LoggingConfig
from megarewarm.errors import UserError
from megarewarm.training.after_step import log as log_part
from megarewarm.training.output.metrics import Metrics
from megarewarm.training.output.run_folder import RunFolder
from megarewarm.training.trainer import train
from tests.support.tiny import config, events, quiet
from tests.training.test_resume import ALONE

FULL = Path("/dev/full")  # every write there fails with ENOSPC, in the kernel
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def until_flushed(metrics: Metrics) -> None:
    """Long enough for TensorBoard's thread to write: it takes twenty points at once."""
    for step in range(200):
        metrics.event("train", step=step, loss=1.0)


@needs_full
@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt"])
def test_a_full_disk_is_named_and_closing_adds_nothing(tmp_path: Path, name: str) -> None:
    metrics = Metrics(tmp_path, LoggingConfig(tensorboard=False), "run", writes=True)
    metrics.close()
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(FULL)
    metrics = Metrics(tmp_path, LoggingConfig(tensorboard=False), "run", writes=True)
    with pytest.raises(UserError, match=rf"{name}: can't be written \(No space left on device\); make room"):
        metrics.event("train", step=1) if name == "metrics.jsonl" else metrics.text("a line")
    metrics.close()


@needs_full
def test_a_disk_that_is_full_at_the_start_is_named(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.config_file.with_name(f"config.yaml.{os.getpid()}.part").symlink_to(FULL)
    with pytest.raises(UserError, match=r"run: can't be written \(.*No space left on device.*\); make room"):
        run.open(config(tmp_path), main=True)


def vanish(folder: Path, number: int) -> None:
    """At one stroke: file after file, the writer might put one between."""
    (folder / "tensorboard").rename(folder / f"gone_{number}")


def test_a_tensorboard_folder_that_vanishes_is_made_anew(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(tmp_path, LoggingConfig(), "run", writes=True)
    for number in range(2):
        until_flushed(metrics)
        vanish(tmp_path, number)
        until_flushed(metrics)
        assert "tensorboard: can't be written (No such file or directory); starting a new event file" in capfd.readouterr().err
        assert list((tmp_path / "tensorboard").iterdir())
    vanish(tmp_path, 2)
    until_flushed(metrics)
    assert "giving up on TensorBoard" in capfd.readouterr().err
    until_flushed(metrics)
    assert not (tmp_path / "tensorboard").exists()
    metrics.event("train", step=1)
    metrics.close()
    assert events(tmp_path, "train")[-1]["step"] == 1


def test_a_tensorboard_folder_that_can_not_be_made_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    metrics = Metrics(tmp_path, LoggingConfig(), "run", writes=True)
    until_flushed(metrics)
    assert capfd.readouterr().err.count("tensorboard: can't be written") == 3
    metrics.close()


def test_boards_show_what_is_written_down_under_the_same_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[tuple[str, int], float] = {}

    def log(values: dict[str, float], step: int) -> None:
        sent.update({(name, step): value for name, value in values.items()})

    writer = SimpleNamespace(log=log, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: writer, __spec__=SimpleNamespace()))
    monkeypatch.setattr(log_part, "_utilisation", lambda run, rate: 0.25)  # that of a known GPU
    quick: dict[str, Any] = {"training": {"budget": 4}, "evaluation": {"every": 2}, "checkpoint": {"every": 4}}
    train(config(tmp_path, **quick, folder=str(tmp_path / "up"), logging={"dynamics": None}), ALONE, quiet())
    boards = {"tensorboard": True, "wandb": {"project": "p"}, "dynamics": 2}
    run = tmp_path / "run"
    keys = {"start": {"from": str(tmp_path / "up")}, "distill": {"kind": "logits", "weight": 0.5}, "logging": boards}
    train(config(tmp_path, **quick, **keys, folder=str(run)), ALONE, quiet())

    written: dict[tuple[str, int], float] = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        if line["event"] == "train":
            row = {f"train/{key}": value for key, value in line.items() if key not in ("event", "time", "step")}
        elif line["event"] == "eval":
            row = {f"validation/{line['name']}": line["loss"]}
        elif line["event"] == "dynamics":
            row = {f"dynamics_{k}/{group}": v for group, numbers in line["groups"].items() for k, v in numbers.items()}
        else:
            continue
        written |= {(name, line["step"]): value for name, value in row.items()}
    assert {"tokens_per_second", "mfu", "data_wait", "distill_loss", "tokens"} <= {n.removeprefix("train/") for n, _ in written}
    assert sent == pytest.approx(written)
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    shown = {(tag, point.step): point.value for tag in board.Tags()["scalars"] for point in board.Scalars(tag)}
    assert shown == pytest.approx(written, rel=1e-6)
