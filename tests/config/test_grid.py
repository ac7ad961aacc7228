"""Intervals in steps: multiples stay multiples in a run of any length, and a run that is in progress keeps its steps."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megarewarm.config.budget import Budget
from megarewarm.config.grid import Grid
from megarewarm.config.schema import RunConfig
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.after_step.dynamics import dynamics_steps
from megarewarm.training.after_step.replicas import replica_checks
from megarewarm.training.start.evaluations import evaluation_steps
from megarewarm.training.start.saving import check_saving, is_saved, saves
from megarewarm.training.trainer import train
from tests.support.tiny import config, events, printed, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))
INTERVALS = st.fractions(1, 50, max_denominator=400)


@given(INTERVALS, st.integers(0, 300))
def test_points_are_counted_and_found(interval: Fraction, last: int) -> None:
    grid = Grid(interval)
    points = [round(k * interval) for k in range(1, 400)]
    inside = [point for point in points if point <= last]
    assert list(grid.points(last)) == inside and grid.count(last) == len(inside)
    assert len(set(inside)) == len(inside)
    for step in range(last + 1):
        assert grid.number(step) == (points.index(step) + 1 if step in inside else None)


@given(INTERVALS, st.integers(1, 12))
def test_points_of_a_multiple_are_points(interval: Fraction, times: int) -> None:
    short, long = Grid(interval), Grid(times * interval)
    assert long.is_multiple_of(short) and set(long.points(900)) <= set(short.points(900))


@pytest.mark.parametrize(("short", "long"), [("1%", "10%"), ("10%", "20%"), ("2.5%", "12.5%"), ("0.1%", "33.3%"), ("1%", "2%")])
def test_shares_of_any_run_are_multiples(short: str, long: str) -> None:
    for total in range(100, 20_000, 3):
        one, two = (Grid(Budget.model_validate(text).exactly_in_steps(1, total)) for text in (short, long))
        if one.interval > 1:  # below it, every step is one
            assert two.is_multiple_of(one), total
        assert set(two.points(total)) <= set(one.points(total)), total


def of_length(base: RunConfig, steps: int) -> RunConfig:
    budget = Budget(amount=steps, unit="steps")
    return base.model_copy(update={"training": base.training.model_copy(update={"budget": budget})})


@pytest.mark.parametrize(
    ("evaluation", "checkpoint"),
    [
        ({}, {}),
        ({"every": "10%"}, {"every": "20%", "keep_every": "40%"}),
        ({"every": "1%"}, {"every": 50, "extra_steps": "log_spaced"}),
        ({"every": "1M tokens"}, {"every": "5%", "keep_every": "10%"}),
        ({"every": "3%", "every_in_warmup": "0.5%"}, {"every": "7%"}),
        ({"every": 13}, {"every": "10%"}),
    ],
)
def test_natural_settings_keep_a_best_checkpoint(tmp_path: Path, evaluation: dict, checkpoint: dict) -> None:
    base = config(
        tmp_path, evaluation={"every": "1%", **evaluation}, checkpoint={"every": "10%", "keep_best": "new", **checkpoint}
    )
    for steps in (*range(100, 1000, 7), *range(1000, 20_000, 611), 195, 9537):
        run = of_length(base, steps)
        check_saving(run, 0, steps / 100)
        every, evaluated = saves(run), set(evaluation_steps(run, 0, steps / 100))
        assert every is not None and set(every.points(steps)) <= evaluated, steps
        assert all(is_saved(run, step) for step in every.points(steps))


def test_what_was_the_rule_is_still_there(tmp_path: Path) -> None:
    run = of_length(config(tmp_path, evaluation={"every": "10%"}, checkpoint={"every": "20%"}, logging={"dynamics": "2%"}), 195)
    run = run.model_copy(update={"intervals": "rounded"})
    assert list(evaluation_steps(run, 0, 0))[:3] == [0, 20, 40]
    assert [step for step in range(100) if is_saved(run, step)] == [39, 78]
    assert sorted(dynamics_steps(run, 5))[:2] == [9, 13]
    assert replica_checks(run, 50) == [100]


def test_a_run_that_an_earlier_version_began_keeps_its_steps(tmp_path: Path) -> None:
    """27 steps and 10 %: 3, 6, 9, ... when the interval was rounded, 3, 5, 8, ... now."""
    settings = {
        "model": {"num_layers": 1},
        "training": {"budget": 27, "global_batch": 2, "micro_batch": 2},
        "evaluation": {"every": "10%"},
        "checkpoint": {"every": 9},
        "logging": {"dynamics": None},
    }
    old = config(tmp_path, intervals="rounded", **settings)
    outcome = train(old, ALONE, quiet())
    expected = sorted({line["step"] for line in events(outcome.folder, "eval")})
    assert expected[:4] == [0, 3, 6, 9]
    shutil.rmtree(outcome.folder / "checkpoints/step_27")  # as if it had been stopped
    stored = yaml.safe_load((outcome.folder / "config.yaml").read_text())
    del stored["intervals"]
    (outcome.folder / "config.yaml").write_text(yaml.safe_dump(stored))
    for _ in range(2):
        console = quiet()
        train(config(tmp_path, **settings), ALONE, console)
        assert "intervals: 'rounded', as when this run was begun" in " ".join(printed(console).split())
        assert sorted({line["step"] for line in events(outcome.folder, "eval")}) == expected
        assert yaml.safe_load((outcome.folder / "config.yaml").read_text())["intervals"] == "rounded"
        shutil.rmtree(outcome.folder / "checkpoints/step_27")
    new = train(config(tmp_path, name="new", folder=str(tmp_path / "fresh"), **settings), ALONE, quiet())
    assert sorted({line["step"] for line in events(new.folder, "eval")})[:4] == [0, 3, 5, 8]
