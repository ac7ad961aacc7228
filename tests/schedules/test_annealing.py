"""The sums of learning rates against the paper's double sum, against what must hold, and in a run's metrics."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.parallel.ranks import Ranks
from megarewarm.schedules.annealing import learning_rate_sums
from megarewarm.training import trainer
from megarewarm.training.trainer import train
from tests.support.tiny import config, events, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))

rates = st.lists(st.floats(0, 1e-2), min_size=1, max_size=40)


def double_sum(lrs: list[float], memory: float) -> float:
    """arXiv 2408.11029, equation 1: S2 = sum_{i<=s} sum_{k<=i} (lr_{k-1} - lr_k) memory^(i-k), in exact arithmetic."""
    exact, ratio = [Fraction(lr) for lr in [lrs[0], *lrs]], Fraction(memory)
    steps = range(1, len(exact))
    return float(sum((exact[k - 1] - exact[k]) * ratio ** (i - k) for i in steps for k in steps if k <= i))


@given(lrs=rates, memory=st.sampled_from([0.0, 0.5, 0.99, 0.999]))
@settings(max_examples=60, deadline=None)
def test_sums_are_the_papers(lrs: list[float], memory: float) -> None:
    total, area = learning_rate_sums(lrs, memory)
    assert total.tolist() == pytest.approx([float(sum(map(Fraction, lrs[: i + 1]))) for i in range(len(lrs))], rel=1e-13)
    for end in {1, len(lrs) // 2 + 1, len(lrs)}:
        assert area[end - 1] == pytest.approx(double_sum(lrs[:end], memory), rel=1e-10, abs=1e-15)


@given(lrs=rates)
def test_falling_counts_for_and_rising_against(lrs: list[float]) -> None:
    falling, rising = sorted(lrs, reverse=True), sorted(lrs)
    assert all(learning_rate_sums(falling).area >= 0) and all(learning_rate_sums(rising).area <= 0)
    assert not learning_rate_sums([lrs[0]] * len(lrs)).area.any()


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"need rates \(n,\) and a memory in \[0, 1\), got \(1, 2\) and 0.999"):
        learning_rate_sums([[1.0, 2.0]])
    with pytest.raises(ValueError, match="and 1"):
        learning_rate_sums([1.0], memory=1.0)


def test_a_run_says_them_and_a_resumed_one_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path)
    original = trainer.training_step

    def step_or_die(run, lr):
        if run.step == 12:
            raise KeyboardInterrupt
        return original(run, lr)

    monkeypatch.setattr(trainer, "training_step", step_or_die)
    with pytest.raises(KeyboardInterrupt):
        train(settings, ALONE, quiet())
    monkeypatch.setattr(trainer, "training_step", original)
    folder = train(settings, ALONE, quiet()).folder
    lines = events(folder, "train")
    assert [line["step"] for line in lines] == [*range(1, 13), *range(11, 21)], "steps 11 and 12 were done twice"
    lrs = list({line["step"]: line["lr"] for line in lines}.values())
    for line in lines:
        until = lrs[: line["step"]]
        assert line["lr_sum"] == pytest.approx(sum(until), rel=1e-12)
        assert line["annealing_area"] == pytest.approx(double_sum(until, 0.999), rel=1e-9, abs=1e-15)
    assert lines[2]["annealing_area"] == pytest.approx(-5e-3) and lines[-1]["annealing_area"] > lines[11]["annealing_area"]


def test_a_run_that_goes_on_counts_its_own_steps(tmp_path: Path) -> None:
    first = train(config(tmp_path, folder=str(tmp_path / "first"), training={"budget": 10}), ALONE, quiet())
    second = config(
        tmp_path, name="second", folder=str(tmp_path / "second"), start={"from": str(first.folder), "intent": "branch"}
    )
    lines = events(train(second, ALONE, quiet()).folder, "train")
    assert np.cumsum([line["lr"] for line in lines]) == pytest.approx([line["lr_sum"] for line in lines], rel=1e-12)
    assert lines[0]["annealing_area"] == 0.0
