"""Budgets in epochs: counted in the training data, shown, and the same at every start."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megarewarm.config.experiment import load_experiment
from megarewarm.config.load import dump, validate
from megarewarm.config.schema import RunConfig
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.files.token_file import open_tokens
from megarewarm.errors import UserError
from megarewarm.lab.experiment import settled
from megarewarm.main import main
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.start.epochs import settle_epochs
from megarewarm.training.start.plan import make_plan
from megarewarm.training.start.run_data import open_data
from megarewarm.training.trainer import train
from tests.support.tiny import mapping, printed, quiet, write_tokens

LENGTH, BATCH = 16, 8
ALONE = Ranks(0, 1, torch.device("cpu"))


def in_epochs(place: Path, epochs: str, **changes: Any) -> dict[str, Any]:
    """A run of ``epochs``, whose source says nothing of how often it may be read."""
    whole = mapping(place, **{"training": {"budget": epochs}, **changes})
    del whole["data"]["train"][0]["max_epochs"]
    return whole


def samples(place: Path, name: str = "new") -> int:
    return (open_tokens(place / name).total_tokens - 1) // LENGTH


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.decimals("0.1", 5, places=2), st.sampled_from([0, 0.05, 0.25, 0.5]))
def test_an_epoch_is_what_the_new_data_hold(tmp_path: Path, epochs: Any, replayed: float) -> None:
    if not (tmp_path / "older.idx").exists():
        write_tokens(tmp_path / "older", 5)
    replay = {"fraction": replayed, "sources": [{"path": str(tmp_path / "older"), "max_epochs": 99}]}
    run = config_of(in_epochs(tmp_path, f"{epochs} epochs", replay=replay))
    ready, (note,) = settle_epochs(run)
    exact = Fraction(str(epochs)) * samples(tmp_path) / (1 - Fraction(repr(replayed))) / BATCH
    assert ready.total_steps == int(exact)
    assert f"is {ready.total_steps} steps: an epoch is {samples(tmp_path):,} samples" in note
    plan = make_plan(ready)
    data = open_data(plan, TokenFiles(ready.data, plan.model.vocab_size))
    new = data.tokens_per_source(0, ready.total_steps * BATCH)["new"] // LENGTH
    assert new <= Fraction(str(epochs)) * samples(tmp_path) < new + BATCH + 2
    assert settle_epochs(ready) == (ready, [])


def config_of(whole: dict[str, Any]) -> RunConfig:
    return validate(RunConfig, whole, {})


def test_it_trains_resumes_and_is_recorded_in_steps(tmp_path: Path) -> None:
    run = config_of(in_epochs(tmp_path, "0.05 epochs", evaluation={"every": "0.02 epochs"}))
    console = quiet()
    steps = train(run, ALONE, console).step
    assert steps == int(Fraction("0.05") * samples(tmp_path) / BATCH)
    assert f"note: training.budget 0.05 epochs is {steps} steps" in printed(console).replace("\n", " ")
    recorded = (tmp_path / "tiny" / "config.yaml").read_text()
    assert f"budget: {steps}\n" in recorded and "epoch" not in recorded.replace("max_epochs", "")
    console = quiet()
    train(run, ALONE, console)
    assert "already complete" in printed(console)
    with pytest.raises(UserError, match=f"holds a run in which training.budget was {steps}, now it is"):
        train(config_of(in_epochs(tmp_path, "0.2 epochs")), ALONE, quiet())


def test_several_sources_and_rows_are_added_up(tmp_path: Path) -> None:
    whole = in_epochs(tmp_path, "1 epoch")
    whole["data"]["train"] = [{"path": str(tmp_path / name), "max_epochs": "3 epochs"} for name in ("old", "new")]
    ready, _ = settle_epochs(config_of(whole))
    assert ready.total_steps == (samples(tmp_path, "old") + samples(tmp_path)) // BATCH
    assert "max_epochs: 3.0" in dump(ready)
    whole["data"]["train"] = [{"path": str(tmp_path / "new"), "split": "1,1", "part": "valid"}]
    half, _ = settle_epochs(config_of(whole))
    assert 0.3 < half.total_steps * BATCH / samples(tmp_path) < 0.7


def test_what_can_not_be_counted_is_named(tmp_path: Path) -> None:
    whole = in_epochs(tmp_path, "1 epoch")
    whole["data"]["train"] = [{"path": str(tmp_path / "nowhere")}]
    with pytest.raises(UserError, match=r"training.budget: epochs are counted in the training data: .*nowhere"):
        settle_epochs(config_of(whole))
    with pytest.raises(UserError, match=r"0.001 epochs of .* samples is less than one step of 8"):
        settle_epochs(config_of(in_epochs(tmp_path, "0.001 epochs")))
    with pytest.raises(UserError, match="can't be counted here: give steps or tokens"):
        _ = config_of(whole).total_steps


def test_the_dry_run_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "run.yml").write_text(yaml.safe_dump(in_epochs(tmp_path, "2 epochs")))
    assert main([str(tmp_path / "run.yml"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    steps = 2 * samples(tmp_path) // BATCH
    assert f"training.budget 2 epochs is {steps} steps: an epoch is {samples(tmp_path):,} samples of 16 tokens" in shown
    assert f"{steps:,} of 128 tokens" in shown


def test_runs_of_an_experiment_may_differ_in_epochs(tmp_path: Path) -> None:
    base = in_epochs(tmp_path, "1 epoch")
    del base["name"], base["folder"]
    sweep = {"name": "s", "axes": {"training.budget": ["0.5 epochs", "1 epoch"]}}
    whole = {"experiment": "e", "folder": str(tmp_path / "e"), "base": base, "sweeps": [sweep]}
    half, full = settled(load_experiment(whole, {})).arms
    assert (half.arm, full.arm) == ("s_0.5epochs", "s_1epoch")
    assert full.config.total_steps == samples(tmp_path) // BATCH == half.config.total_steps * 2 + full.config.total_steps % 2
    prepare = {"tokenizer": {"vocab_size": 64, "train_on": "c"}, "corpora": {"c": {"from": ["x.txt"]}}}
    with pytest.raises(UserError, match=r"run 's_0.5epochs': training.budget: .*before 'prepare' makes the data"):
        settled(load_experiment(whole | {"prepare": prepare}, {}))
    later = {"name": "later", "start": {"from": "${runs}/first@50%"}}
    chain = whole | {"sweeps": [], "runs": [{"name": "first"}, later]}
    with pytest.raises(UserError, match="'@50%' of 'first': where lengths are in epochs, write the step"):
        load_experiment(chain, {})
