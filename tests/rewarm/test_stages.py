"""Several data sets in sequence: an infinite schedule that goes on from one to the next, releases annealed from its trunk, and
chains that are taken up again wherever they were cut off."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from megarewarm.checkpoint.source import OwnCheckpoint
from megarewarm.config.experiment import Experiment
from megarewarm.errors import UserError
from megarewarm.lab.experiment import run_experiment
from megarewarm.parallel.engine import ParallelModel
from megarewarm.training.trainer import train
from tests.lab.test_local import experiment
from tests.support.tiny import events, quiet
from tests.training.test_resume import ALONE

CONSTANT = 5e-3


def chain(place: Path, **second: object) -> Experiment:
    """Two data sets at one constant rate, 20 steps each, and a release from the middle of the second."""
    schedule = {"curve": "infinite_cosine", "constant_lr": "50%", "cooldown": "40%", "constant": "50%"}
    flat = {"curve": "constant", "max_lr": CONSTANT, "min_lr": None, "warmup": 0} | second
    data = {"train": [{"path": str(place / "old"), "max_epochs": 9}]}
    runs: list[dict[str, Any]] = [
        {
            "name": "trunk",
            "stages": [
                {"name": "first", "schedule": schedule},
                {"name": "second", "data": data, "start": {"intent": "continue"}, "schedule": flat},
            ],
        },
        {
            "name": "release",
            "start": {"from": "${runs}/trunk-second@50%", "intent": "branch"},
            "data": data,
            "training": {"budget": 10},
            "schedule": {"curve": "linear", "max_lr": CONSTANT, "min_lr": 0.0, "warmup": 0},
        },
    ]
    return experiment(place, runs)


def column(whole: Experiment, arm: str, key: str) -> list[float]:
    return [line[key] for line in events(Path(whole.folder) / arm, "train")]


def checkpoint(whole: Experiment, arm: str, step: int) -> OwnCheckpoint:
    return OwnCheckpoint(Path(whole.folder) / arm / "checkpoints" / f"step_{step}", verified=True)


def test_the_trunk_goes_on_and_a_release_is_annealed_beside_it(tmp_path: Path) -> None:
    whole = chain(tmp_path)
    gc.collect()
    gc.disable()  # so that what is gone was given up, not found by chance
    try:
        assert run_experiment(whole, ALONE, quiet()) == 0
        assert not [held for held in gc.get_objects() if isinstance(held, ParallelModel)]
    finally:
        gc.enable()
    first, second, release = (column(whole, arm, "lr") for arm in ("trunk-first", "trunk-second", "release"))
    assert first[-1] == second[0] == second[-1] == pytest.approx(CONSTANT)
    assert release[0] == pytest.approx(CONSTANT) and release[-1] == pytest.approx(CONSTANT / 10)
    states = [checkpoint(whole, "trunk-first", 20).training, checkpoint(whole, "trunk-second", 20).training]
    assert [state.optimizer_step for state in states if state] == [20, 40]
    assert [state.samples for state in states if state] == [160, 160]  # the second data set from its start
    stages = checkpoint(whole, "release", 10).lineage.stages
    assert [stage.run for stage in stages] == ["trunk-first", "trunk-second", "release"]
    assert [stage.steps for stage in stages] == [20, 10, 10]
    # the release reads on where the trunk stood: its first batch is the trunk's eleventh, at the same weights and rate
    assert events(Path(whole.folder) / "release", "train")[0]["loss"] == pytest.approx(
        column(whole, "trunk-second", "loss")[10]
    )


@pytest.mark.slow
def test_a_chain_cut_off_anywhere_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    whole, cut = chain(tmp_path / "one"), chain(tmp_path / "two")
    run_experiment(whole, ALONE, quiet())
    train(cut.arms[0].config, ALONE, quiet())
    # the second stage loses what came after its tenth step
    train(cut.arms[1].config, ALONE, quiet())
    for step in (15, 20):
        for file in sorted((Path(cut.folder) / "trunk-second" / "checkpoints" / f"step_{step}").rglob("*"), reverse=True):
            file.unlink()
        (Path(cut.folder) / "trunk-second" / "checkpoints" / f"step_{step}").rmdir()
    assert run_experiment(cut, ALONE, quiet()) == 0
    for arm in ("trunk-second", "release"):
        last = 20 if arm == "trunk-second" else 10
        one, two = (checkpoint(each, arm, last).whole_model().state_dict() for each in (whole, cut))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_continuing_at_another_rate_is_refused(tmp_path: Path) -> None:
    whole = chain(tmp_path, max_lr=1e-2)
    train(whole.arms[0].config, ALONE, quiet())
    with pytest.raises(UserError, match=r"at the checkpoint's learning rate, 0.005, and this schedule begins at 0.01"):
        train(whole.arms[1].config, ALONE, quiet())
