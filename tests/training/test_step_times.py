"""Slow steps and slow ranks are named, and the time limit leaves room for the last save."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from megarewarm.checkpoint.own.state import read_state
from megarewarm.config.reliability import Duration, ReliabilityConfig
from megarewarm.errors import EXIT_TIME_LIMIT
from megarewarm.parallel.ranks import Ranks
from megarewarm.training import trainer
from megarewarm.training.after_step.step_times import StepTimes
from megarewarm.training.after_step.time_limit import TimeLimit
from megarewarm.training.trainer import train
from tests.support.tiny import config, events, quiet

HOSTS = ["n0", "n0", "n1", "n1"]


def test_a_slow_step_names_the_rank_that_worked_longest() -> None:
    times = StepTimes(ReliabilityConfig(), HOSTS)
    for _ in range(20):
        assert times.add(2.0, [1.0, 1.1, 1.0, 1.05]) == []
    (alarm,) = times.add(8.0, [1.0, 7.5, 1.0, 1.0])
    assert alarm.kind == "slow_step"
    assert alarm.message == (
        "took 8.0 s, 4.0 times the median of 2.00 s; rank 1 on n0 worked longest, 7.5 s (median rank 1.0 s)"
    )
    assert times.add(5.9, [1.0] * 4) == [], "under three times the median"


def test_short_steps_and_short_runs_are_left_alone() -> None:
    times = StepTimes(ReliabilityConfig(), ["here"])
    assert all(times.add(0.01, [0.01]) == [] for _ in range(20))
    assert times.add(0.9, [0.9]) == []  # ninety times as long, and nothing that anybody would notice
    times = StepTimes(ReliabilityConfig(), ["here"])
    assert all(times.add(seconds, [seconds]) == [] for seconds in [1.0] * 15 + [60.0])
    off = StepTimes(ReliabilityConfig(slow_step=None), ["here"])
    assert all(off.add(seconds, [seconds]) == [] for seconds in [1.0] * 30 + [60.0])


def test_a_rank_that_is_always_last_is_named_once_until_it_recovers() -> None:
    times = StepTimes(ReliabilityConfig(), HOSTS)
    found = [alarm for _ in range(200) for alarm in times.add(2.0, [1.0, 1.0, 1.5, 1.01])]
    assert [alarm.kind for alarm in found] == ["slow_rank"]
    assert found[0].message.startswith("rank 2 on n1 is the last in 64 of 64 steps: 1.5 s, the others 1 s")
    assert [alarm for _ in range(100) for alarm in times.add(2.0, [1.0, 1.02, 1.0, 1.01])] == []
    assert len([alarm for _ in range(100) for alarm in times.add(2.0, [1.0, 1.0, 1.5, 1.01])]) == 1


def test_ranks_that_take_turns_are_not_slow() -> None:
    times = StepTimes(ReliabilityConfig(), HOSTS)
    for step in range(200):
        busy = [1.0] * 4
        busy[step % 4] = 2.0
        assert times.add(2.0, busy) == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("23h30m", 84600), ("90m", 5400), ("2d", 172800), ("45s", 45), ("1:30:00", 5400), ("1-02:00:30", 93630), ("1d2h", 93600)],
)
def test_lengths_of_time(text: str, seconds: int) -> None:
    assert Duration.model_validate(text).seconds == seconds


@given(st.integers(1, 10**7))
def test_lengths_of_time_survive_being_written(seconds: int) -> None:
    duration = Duration(seconds=seconds)
    assert Duration.model_validate(duration.model_dump()) == duration


@pytest.mark.parametrize("text", ["", "12:30", "5", 5, "h", "1h 30", "-1h", "0s", None, "1.5h", "1m1h"])
def test_what_is_no_length_of_time(text: object) -> None:
    with pytest.raises(ValidationError):
        Duration.model_validate(text)


def test_the_limit_counts_the_longest_step_and_save() -> None:
    limit = TimeLimit(Duration(seconds=100), time.monotonic() - 80, {})
    assert not limit.is_over  # 5 s are kept for a save that has not been timed
    limit.step(3.0)
    limit.saved(10.0)
    assert not limit.is_over
    limit.saved(12.0)
    assert limit.is_over
    assert not TimeLimit(None, time.monotonic() - 1e9, {}).is_over


def test_under_slurm_the_job_counts_not_the_process() -> None:
    job = {"SLURM_JOB_START_TIME": str(int(time.time()) - 90)}
    assert TimeLimit(Duration(seconds=60), time.monotonic(), job).is_over
    assert not TimeLimit(Duration(seconds=60), time.monotonic(), {}).is_over


def test_a_run_ends_at_its_limit_and_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(config(tmp_path, folder=str(tmp_path / "whole")), Ranks(0, 1, torch.device("cpu")), quiet())
    run = config(tmp_path, reliability={"max_wall_time": "1h"})
    original = trainer.training_step
    monkeypatch.setattr(trainer, "training_step", lambda run, lr: (_pass_time(run.step), original(run, lr))[1])
    now = [0.0]

    def _pass_time(step: int) -> None:
        now[0] += 600.0

    clock = time.monotonic
    monkeypatch.setattr("megarewarm.training.after_step.time_limit.time.monotonic", lambda: clock() + now[0])
    console = quiet()
    ended = train(run, Ranks(0, 1, torch.device("cpu"), began=clock()), console)
    # after five steps of ten minutes another one fits, but not the save
    assert (ended.exit_code, ended.step) == (EXIT_TIME_LIMIT, 6) or ended.step == 5
    assert read_state(ended.folder / f"checkpoints/step_{ended.step}").step == ended.step
    assert events(ended.folder, "stop")[-1]["reason"] == "time limit of 1h"
    monkeypatch.undo()
    again = train(run, Ranks(0, 1, torch.device("cpu")), quiet())
    assert again.exit_code == 0 and again.losses == whole.losses
