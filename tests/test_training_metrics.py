"""What befalls the files of a run while it trains: full disks are named once, TensorBoard never ends a run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny import config, events

from megarewarm.config.execution import LoggingConfig
from megarewarm.errors import UserError
from megarewarm.training.metrics import Metrics
from megarewarm.training.run_folder import RunFolder

FULL = Path("/dev/full")  # every write there fails with ENOSPC, in the kernel
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def until_flushed(metrics: Metrics) -> None:
    """Long enough for TensorBoard's thread to write: it takes twenty points at once."""
    for step in range(200):
        metrics.scalars(step, {"loss": 1.0})


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
        assert "tensorboard: can't be written (No such file or directory); it is begun anew" in capfd.readouterr().err
        assert list((tmp_path / "tensorboard").iterdir())
    vanish(tmp_path, 2)
    until_flushed(metrics)
    assert "nothing more is written there" in capfd.readouterr().err
    until_flushed(metrics)
    assert not (tmp_path / "tensorboard").exists()
    metrics.event("train", step=1)
    metrics.close()
    assert [line["step"] for line in events(tmp_path, "train")] == [1]


def test_a_tensorboard_folder_that_can_not_be_made_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    metrics = Metrics(tmp_path, LoggingConfig(), "run", writes=True)
    until_flushed(metrics)
    assert capfd.readouterr().err.count("tensorboard: can't be written") == 3
    metrics.close()
