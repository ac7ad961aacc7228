"""Blends that switch: each source goes on where it was, whatever the moment; and the moment is the one that was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.config.data import DataConfig, Source
from megarewarm.config.schedule import build_schedule
from megarewarm.config.schema import RunConfig
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.mixture.batches import TrainingBatches, build_training_batches
from megarewarm.data.mixture.blend import Blend, GreedyTable
from megarewarm.data.mixture.phases import Phase, PhasedBlend
from megarewarm.errors import UserError
from megarewarm.parallel.ranks import Ranks
from megarewarm.rewarm.reset import Position
from megarewarm.rewarm.switches import switch_step, training_phases
from megarewarm.training import trainer
from megarewarm.training.trainer import train
from tests.support.tiny import config, events, quiet, write_tokens

ALONE = Ranks(0, 1, torch.device("cpu"))
WEIGHTS = st.lists(st.integers(1, 9).map(float), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(phases=st.lists(st.tuples(st.integers(1, 50), WEIGHTS), min_size=1, max_size=4), table=st.booleans(), data=st.data())
def test_phases_are_their_blends_one_after_the_other(phases, table, data):
    sources = 6
    places = [
        np.array(data.draw(st.lists(st.integers(0, sources - 1), min_size=len(w), max_size=len(w), unique=True)))
        for _, w in phases
    ]
    blends = [GreedyTable(weights, length) if table else Blend(weights) for length, weights in phases]
    firsts = np.cumsum([0] + [length for length, _ in phases])
    phased = PhasedBlend(firsts[:-1].tolist(), blends, places, sources)
    taken = np.zeros(sources, int)
    expected: list[tuple[int, int]] = []
    for (length, _), blend, mine in zip(phases, blends, places, strict=True):
        for local in blend.locate(np.arange(length))[0].tolist():
            assert np.array_equal(phased.counts(len(expected)), taken)
            source = mine[local]
            expected.append((source, taken[source]))
            taken[source] += 1
    source, index = phased.locate(np.arange(len(expected)))
    assert list(zip(source.tolist(), index.tolist(), strict=True)) == expected
    order = np.random.default_rng(0).permutation(len(expected))
    assert np.array_equal(phased.locate(order)[1], index[order])


def build(folder: Path, phases: list[tuple[int, list[dict]]], total: int, order: str = "permuted") -> TrainingBatches:
    data = DataConfig(sequence_length=16, order=order, train=phases[0][1])
    laid = [Phase(first, [Source(**source) for source in sources]) for first, sources in phases]
    return build_training_batches(TokenFiles(data, 64), laid, total_samples=total)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("phases")
    return {name: write_tokens(folder / name, seed) for seed, name in enumerate("abc")}


@pytest.mark.parametrize("order", ["permuted", "neox", "megatron"])
def test_a_source_in_both_blends_goes_on_where_it_was(files, tmp_path, order):
    a, b, c = ({"path": files[name], "max_epochs": None} for name in "abc")
    both = build(tmp_path, [(0, [a | {"weight": 3}, b]), (80, [c, a | {"weight": 3}])], 160, order)
    rows, locate = both.rows(0, 160), both.tokens_per_source
    assert both.names == ["a", "b", "c"] and locate(0, 160) == {"a": 120 * 16, "b": 20 * 16, "c": 20 * 16}
    assert locate(80, 80) == {"a": 60 * 16, "b": 0, "c": 20 * 16}
    first = build(tmp_path, [(0, [a | {"weight": 3}, b])], 80, order)
    if order == "permuted":  # in the others the number of samples decides the epochs, and so the order
        assert np.array_equal(rows[:80], first.rows(0, 80))
        alone = build(tmp_path, [(0, [a])], 120)
        from_a = rows[both._mixture.rows._blend.locate(np.arange(160))[0] == 0]
        assert np.array_equal(from_a, alone.rows(0, 120))
    assert np.array_equal(both.rows(70, 20), rows[70:90])


def test_the_fingerprint_of_what_was_read_knows_nothing_of_later_switches(files, tmp_path):
    a, b, c = ({"path": files[name]} for name in "abc")
    plain = build(tmp_path, [(0, [a, b])], 160)
    switched = build(tmp_path, [(0, [a, b]), (100, [a, c])], 160)
    assert switched.fingerprint(before=100) == plain.fingerprint(before=100) == plain.fingerprint()
    assert switched.fingerprint(before=101) != plain.fingerprint(before=101)
    later = build(tmp_path, [(0, [a, b]), (100, [a, c]), (150, [b])], 160)
    assert later.fingerprint(before=150) == switched.fingerprint() != later.fingerprint()
    moved = build(tmp_path, [(0, [a, b]), (101, [a, c])], 160)
    assert moved.fingerprint() != switched.fingerprint()


def test_one_source_has_one_limit(files, tmp_path):
    a, b = ({"path": files[name]} for name in "ab")
    with pytest.raises(UserError, match=r"has max_epochs 1.0 in one blend and 2.0 in another"):
        build(tmp_path, [(0, [a, b]), (10, [a | {"max_epochs": 2}])], 20)
    with pytest.raises(UserError, match=r"source 'a' gives .* in max_epochs 1, the run needs"):
        build(tmp_path, [(0, [a, b]), (10, [a])], 400)


def steps_of(run: RunConfig, origin: Position) -> list[int]:
    schedule = build_schedule(run.schedule, run.steps, run.total_steps - origin.step)
    return [switch_step(switch, run, schedule, origin, "switch") for switch in run.data.switches]


WARM_2 = {"warmup": 2}


def test_when_a_switch_takes_place(tmp_path):
    train_on = [{"path": str(tmp_path / "old")}]
    moments: list[dict[str, Any]] = [{"at": 4}, {"at": "1024 tokens"}, {"at": "60%"}, {"lr_below": 2e-3}]
    run = config(tmp_path, data={"switches": [moment | {"train": train_on} for moment in moments]}, schedule=WARM_2)
    steps = steps_of(run, Position(0, 0, 0, 0))
    schedule = build_schedule(run.schedule, run.steps, run.total_steps)
    assert steps[:3] == [4, 8, 12]
    # completed steps n: the next step uses lr(n), the first below
    assert schedule.lr(steps[3]) < 2e-3 <= schedule.lr(steps[3] - 1) and steps[3] > 12
    longer = config(tmp_path, data={"switches": [moments[3] | {"train": train_on}]}, training={"budget": 27}, schedule=WARM_2)
    assert steps_of(longer, Position(7, 0, 100, 0)) == [steps[3] + 7], "a schedule that begins at step 7"
    phases = training_phases(run, schedule, Position(0, 0, 0, 0), [])
    assert [phase.first for phase in phases] == [0, *(8 * step for step in steps)]


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ([{"at": 20}], "is step 20, the run ends at 20"),
        ([{"at": 0}], "takes place before the first step"),
        ([{"at": 9}, {"at": 9}], "switches.1 takes place after step 9, which is not after the one before"),
        ([{"lr_below": 1e-4}], "never falls below 0.0001"),
        ([{"lr_below": 1.0}], "1 is above the peak 0.01"),
        ([{"at": 3, "lr_below": 1e-3}], "give one of them"),
        ([{}], "give one of them"),
        ([{"at": 3, "replay_fraction": 0.1}], "nothing to replay"),
    ],
)
def test_switches_that_can_t_be(tmp_path, switches, message):
    with pytest.raises(UserError, match=message):
        run = config(tmp_path, data={"switches": [{"train": [{"path": str(tmp_path / "old")}]} | each for each in switches]})
        train(run, ALONE, quiet())
    assert not (tmp_path / "tiny").exists()


def test_a_run_across_a_switch_stopped_and_started_again_is_the_same(tmp_path, monkeypatch):
    switches = [
        {"lr_below": 5e-3, "train": [{"path": str(tmp_path / "old")}, {"path": str(tmp_path / "new"), "max_epochs": 9}]}
    ]
    whole = train(config(tmp_path, folder=str(tmp_path / "whole"), data={"switches": switches}), ALONE, quiet())
    original = trainer.training_step

    def step_or_die(run, lr):
        if run.step == 17:
            raise KeyboardInterrupt
        return original(run, lr)

    monkeypatch.setattr(trainer, "training_step", step_or_die)
    broken = config(tmp_path, folder=str(tmp_path / "broken"), data={"switches": switches})
    with pytest.raises(KeyboardInterrupt):
        train(broken, ALONE, quiet())
    monkeypatch.setattr(trainer, "training_step", original)
    again = train(broken, ALONE, quiet())
    assert again.losses == whole.losses
    lines = [{line["step"]: line["loss"] for line in events(run.folder, "train")} for run in (whole, again)]
    assert lines[0] == lines[1]


def test_a_branch_may_switch_where_the_trunk_has_not_yet(tmp_path):
    """Annealing on other data: the branch goes on in the trunk's data, and changes the blend after its own step 5."""
    train(config(tmp_path, name="trunk", folder=str(tmp_path / "trunk")), ALONE, quiet())
    start = {"from": str(tmp_path / "trunk"), "intent": "branch"}
    switches = [{"at": 5, "train": [{"path": str(tmp_path / "old")}]}]
    branch = train(config(tmp_path, start=start, training={"budget": 10}, data={"switches": switches}), ALONE, quiet())
    assert branch.step == 10
    other = [{"path": str(tmp_path / "old"), "max_epochs": 9}]
    with pytest.raises(UserError, match="it was trained on other data"):
        train(config(tmp_path, name="no", folder=str(tmp_path / "no"), start=start, data={"train": other}), ALONE, quiet())
