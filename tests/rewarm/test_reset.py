"""The reset table: presets, overrides, and requests that a checkpoint can't honour."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarewarm.checkpoint.lineage import Lineage
from megarewarm.checkpoint.own.state import TrainingState
from megarewarm.checkpoint.source import ALL_LINES
from megarewarm.config.data import Source
from megarewarm.config.model import ModelConfig
from megarewarm.config.schema import StartConfig
from megarewarm.errors import UserError
from megarewarm.rewarm.replay import with_replay
from megarewarm.rewarm.reset import Position, resolve, start_position, table
from megarewarm.schedules.schedule import Schedule

MODEL = ModelConfig(num_layers=1, hidden_size=16, num_heads=2, vocab_size=16)
TRAINING = TrainingState(
    run="old",
    intent="scratch",
    step=100,
    tokens=6400,
    optimizer_step=99,
    schedule_position=98,
    schedule={"curve": "constant", "max_lr": 1e-3, "warmup_steps": 0.0, "length": 100.0},
    last_lr=1e-3,
    samples=400,
    data_fingerprint="0123456789abcdef",
    model=MODEL,
    lineage=Lineage(),
    start_position=(0, 0, 0),
)


@dataclass
class Checkpoint:
    """A source with or without training state."""

    training: TrainingState | None
    name: str = "somewhere"
    format: str = "test"
    model_config: ModelConfig = MODEL
    notes: list[str] = field(default_factory=list)
    lineage: Lineage = field(default_factory=Lineage)

    @property
    def keeps(self) -> frozenset[str]:
        return frozenset() if self.training is None else ALL_LINES

    def load_weights(self, model: Any) -> None:
        raise AssertionError("the table is settled before anything is loaded")

    def load_tensors(self, tensors: Any) -> None:
        raise AssertionError("the table is settled before anything is loaded")


FULL: Any = Checkpoint(TRAINING)
WEIGHTS_ONLY: Any = Checkpoint(None)


def start(**keys: Any) -> StartConfig:
    return StartConfig.model_validate({"from": "somewhere", **keys})


def test_presets_mean_what_the_documentation_says() -> None:
    assert start_position(resolve(start(intent="resume"), FULL), TRAINING) == Position(100, 98, 400, 99)
    assert start_position(resolve(start(intent="rewarm"), FULL), TRAINING) == Position(0, 0, 0, 0)
    assert start_position(resolve(start(intent="branch"), FULL), TRAINING) == Position(0, 0, 400, 99)
    assert resolve(start(intent="branch"), FULL).moments == "keep"
    assert resolve(start(), FULL).intent == "rewarm" and resolve(StartConfig(), None).intent == "scratch"


def test_every_line_can_be_overridden() -> None:
    """The thing neither GPT-NeoX nor Megatron-LM can say: keep the moments, restart the schedule."""
    policy = resolve(start(intent="rewarm", moments="keep"), FULL)
    assert (policy.moments, policy.optimizer_step, policy.schedule, policy.data) == ("keep", "keep", "restart", "restart")
    assert start_position(policy, TRAINING) == Position(0, 0, 0, 99)
    policy = resolve(start(intent="resume", schedule="restart", rng="reseed"), FULL)
    assert start_position(policy, TRAINING) == Position(100, 0, 400, 99)


@pytest.mark.parametrize(
    ("line", "value", "remedy"),
    [
        ("moments", "keep", "reset"),
        ("moments", "keep_second", "reset"),
        ("optimizer_step", "keep", "reset"),
        ("schedule", "continue", "restart"),
        ("iteration", "continue", "restart"),
        ("data", "continue", "restart"),
        ("rng", "keep", "reseed"),
        ("loss_scale", "keep", "reset"),
    ],
)
def test_weights_only_checkpoints_honour_no_more_than_weights(line: str, value: str, remedy: str) -> None:
    keys = {line: value} | ({"optimizer_step": "reset"} if line == "moments" else {})
    with pytest.raises(UserError, match=rf"start\.{line}: '{value}' can't be honoured.*set it to '{remedy}'"):
        resolve(start(intent="rewarm", **keys), WEIGHTS_ONLY)
    with pytest.raises(UserError, match=rf"start\.{line}: nothing to {value} in a run from scratch; set it to '{remedy}'"):
        resolve(StartConfig.model_validate(keys), None)
    with pytest.raises(UserError, match="can't be honoured"):
        resolve(start(intent="resume"), WEIGHTS_ONLY)


def test_measured_moments_bring_their_count() -> None:
    policy = resolve(start(moments="measure"), WEIGHTS_ONLY)
    position = start_position(policy, None, 7)
    assert policy.optimizer_step == "measure" and position == Position(0, 0, 0, 7)
    rows = {row.line: row for row in table(policy, WEIGHTS_ONLY, Schedule("constant", 1e-4, 0.0, 10.0), position, 123, 7)}
    assert rows["moments"].run_has == "measured at rate 0 over the 7 batches of the first steps"
    assert (rows["optimizer_step"].checkpoint_had, rows["optimizer_step"].run_has) == ("not stored", "7")
    for step in ("keep", "reset"):
        with pytest.raises(UserError, match=rf"start\.optimizer_step: '{step}' contradicts moments 'measure'.*remove it"):
            resolve(start(moments="measure", optimizer_step=step), WEIGHTS_ONLY)
    with pytest.raises(UserError, match="a run from scratch has 'reset'"):
        resolve(StartConfig(moments="measure"), None)


def test_half_states_are_refused() -> None:
    with pytest.raises(UserError, match="without bias correction"):
        resolve(start(moments="reset", optimizer_step="keep"), FULL)
    with pytest.raises(UserError, match="meaningless"):
        resolve(start(weights="initialise", moments="keep"), FULL)
    with pytest.raises(UserError, match=r"'load' needs 'start\.from'"):
        resolve(StartConfig(weights="load"), None)


def test_every_combination_is_either_refused_or_says_what_it_does() -> None:
    schedule = Schedule("constant", 1e-4, 0.0, 10.0)
    choices = product(
        ("keep", "reset", "keep_second"),
        ("keep", "reset"),
        ("restart", "continue"),
        ("restart", "continue"),
        ("reseed", "keep"),
    )
    seen = 0
    for moments, step, sched, data, rng in choices:
        try:
            policy = resolve(start(moments=moments, optimizer_step=step, schedule=sched, data=data, rng=rng), FULL)
        except UserError:
            assert (moments, step) == ("reset", "keep")
            continue
        position = start_position(policy, TRAINING)
        rows = {row.line: row for row in table(policy, FULL, schedule, position, 123, 7)}
        assert rows["optimizer_step"].run_has == str(99 if step == "keep" else 0)
        assert rows["data"].run_has == f"sample {400 if data == 'continue' else 0}"
        assert rows["moments"].checkpoint_had == "exp_avg, exp_avg_sq after 99 steps"
        assert "peak 0.0001" in rows["schedule"].run_has
        seen += 1
    assert seen == 3 * 2 * 2 * 2 * 2 - 8


@given(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=5),
    st.lists(st.floats(0.01, 100), min_size=1, max_size=5),
    st.floats(0.001, 0.999),
)
def test_replay_takes_its_share_and_leaves_proportions(new: list[float], old: list[float], fraction: float) -> None:
    sources = with_replay(
        [Source(path=f"n{i}", weight=w) for i, w in enumerate(new)],
        [Source(path=f"o{i}", weight=w) for i, w in enumerate(old)],
        fraction,
    )
    weights = [source.weight for source in sources]
    assert sum(weights) == pytest.approx(1) and sum(weights[len(new) :]) == pytest.approx(fraction)
    assert weights[0] / weights[len(new) - 1] == pytest.approx(new[0] / new[-1])
    assert weights[len(new)] / weights[-1] == pytest.approx(old[0] / old[-1])
