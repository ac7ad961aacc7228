"""Which checkpoints stay: rules against a plain restatement, and a run whose folder ends as they say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megarewarm.checkpoint.own.folder import checkpoints_in
from megarewarm.checkpoint.own.retention import Retention
from megarewarm.checkpoint.own.state import read_state
from megarewarm.config.execution import LOG_SPACED
from megarewarm.config.grid import Grid
from megarewarm.errors import UserError
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.trainer import train
from tests.support.tiny import config, events, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))


@given(
    steps=st.sets(st.integers(0, 60), min_size=1),
    losses=st.lists(st.none() | st.sampled_from([1.0, 1.5, 2.0]), min_size=61, max_size=61),
    keep_last=st.integers(1, 5),
    keep_every=st.none() | st.integers(1, 20),
    for_good=st.frozensets(st.integers(0, 60), max_size=4),
    best_on=st.none() | st.just("old"),
)
def test_rules(steps, losses, keep_last, keep_every, for_good, best_on) -> None:
    table = {step: losses[step] for step in steps}
    staying = Retention(keep_last, None if keep_every is None else Grid(keep_every), for_good, best_on).staying(table)
    assert staying <= steps and max(steps) in staying
    measured = [loss for loss in table.values() if loss is not None]
    for step in steps:
        newer = sum(other > step for other in steps)
        is_best = best_on is not None and table[step] is not None and table[step] == min(measured)
        first_best = is_best and all(table[other] != table[step] for other in steps if other < step)
        wanted = newer < keep_last or step in for_good or (keep_every is not None and step % keep_every == 0) or first_best
        assert (step in staying) == wanted


def test_removing_as_it_goes_is_removing_at_the_end() -> None:
    """The best of those that stayed is the best of all: nothing that a later rule wants has gone before."""
    rules = Retention(2, Grid(6), frozenset({3}), "old")
    losses = {step: float((step * 7) % 11) for step in range(1, 40)}
    standing: dict[int, float | None] = {}
    for step, loss in losses.items():
        standing[step] = loss
        staying = rules.staying(standing)
        standing = {kept: value for kept, value in standing.items() if kept in staying}
    assert set(standing) == rules.staying(dict(losses))


def test_a_run_keeps_what_it_is_told_to(tmp_path: Path) -> None:
    run = config(
        tmp_path,
        evaluation={"every": 2},
        checkpoint={"every": 2, "keep_last": 2, "keep_every": 8, "keep_best": "old", "extra_steps": "log_spaced"},
    )
    outcome = train(run, ALONE, quiet())
    old = {line["step"]: line["loss"] for line in events(outcome.folder, "eval") if line["name"] == "old"}
    saved = {line["step"] for line in events(outcome.folder, "save")}
    assert saved == {0, 1, *range(2, 21, 2)}
    best = min((step for step in saved if step in old), key=lambda step: old[step])
    found = dict(checkpoints_in(outcome.folder / "checkpoints"))
    assert set(found) == {*(step for step in LOG_SPACED if step <= 20), 8, 16, 18, 20, best}
    for step, folder in found.items():
        assert read_state(folder).measured.get("old") == old.get(step)


def test_the_beginning_can_be_continued(tmp_path: Path) -> None:
    """A run that is killed after the checkpoint of step 0 goes on from it, and does not measure the start again."""
    settings = {"training": {"budget": 4}, "checkpoint": {"every": None, "extra_steps": [0]}}
    whole = train(config(tmp_path, folder=str(tmp_path / "whole"), **settings), ALONE, quiet())
    broken = config(tmp_path, **settings)
    outcome = train(broken, ALONE, quiet())
    shutil.rmtree(outcome.folder / "checkpoints/step_4")
    again = train(broken, ALONE, quiet())
    assert again.losses == whole.losses
    assert sum(line["step"] == 0 for line in events(again.folder, "eval")) == 2


@pytest.mark.parametrize(
    ("checkpoint", "says"),
    [
        ({"keep_best": "nowhere"}, r"keep_best: there is no validation set 'nowhere' \(there are: old, new\)"),
        ({"keep_best": "old", "every": None}, "keep_best: no step before the last is both evaluated and saved; give a shorter"),
        ({"keep_best": "old", "every": 20}, "keep_best: no step before the last is both evaluated and saved; give a shorter"),
        ({"every": 5, "keep_every": 8}, "keep_every: 8 steps is no multiple of checkpoint.every"),
        ({"every": None, "keep_every": 8}, "no multiple of checkpoint.every .only the end"),
    ],
)
def test_what_would_never_be_kept_is_refused(tmp_path: Path, checkpoint: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        train(config(tmp_path, checkpoint=checkpoint), ALONE, quiet())
    assert not (tmp_path / "tiny").exists()
