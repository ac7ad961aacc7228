"""Candidates for a start: what their names mean, scores against transformers and the run's own evaluations, probes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import kendalltau
from transformers import AutoModelForCausalLM

from megarewarm.cli.choose_start import main
from megarewarm.config.arms import Arm
from megarewarm.errors import UserError
from megarewarm.lab import start_scores
from megarewarm.lab.candidates import find_candidates
from megarewarm.lab.local import Result
from megarewarm.laws.evidence import logme, standardised
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.trainer import train
from tests.support.tiny import config, events, mapping, quiet, write_tokens

ALONE = Ranks(0, 1, torch.device("cpu"))
SCHEDULE = {"curve": "wsd", "max_lr": 1e-2, "min_lr": 1e-3, "warmup": "10%", "decay": "50%", "decay_shape": "linear"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An upstream run with four checkpoints and an export, and the run file RUN.yml."""
    place = tmp_path_factory.mktemp("starts")
    upstream = {"train": [{"path": str(place / "old"), "max_epochs": 9}]}
    settings = config(
        place, name="upstream", folder=str(place / "upstream"), data=upstream, schedule=SCHEDULE, export={"huggingface": True}
    )
    train(settings, ALONE, quiet())
    run = mapping(place, evaluation={"every": 2}, checkpoint={"every": 2})
    del run["model"]
    (place / "RUN.yml").write_text(yaml.safe_dump(run))
    return place


def scored(place: Path, out: Path, *words: object) -> list[dict[str, Any]]:
    main([*map(str, words), "--on", str(place / "new"), "--and", str(place / "old"), "--output", str(out)])
    assert (out / "start_scores.png").stat().st_size > 10_000
    found: list[dict[str, Any]] = json.loads((out / "start_scores.json").read_text())
    return found


def test_names_of_candidates(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    labels = lambda *names: [each.label for each in find_candidates(names)]  # noqa: E731
    every = ["upstream@5", "upstream@10", "upstream@15", "upstream@20"]
    assert labels("upstream@*") == labels("upstream/checkpoints/step_*") == every
    assert labels("upstream@1*", "upstream/huggingface") == ["upstream@10", "upstream@15", "huggingface"]
    assert labels("upstream@25%", "upstream@1280 tokens", "upstream") == ["upstream@5", "upstream@10", "upstream"]
    phases = [str(each.phase) for each in find_candidates(["upstream@*", "upstream/huggingface"])]
    assert phases == ["stable, 100 %", "stable, 100 %", "decay, 64 %", "decay, 19 %", "not recorded"]


def test_scores_are_those_of_transformers_and_of_the_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = scored(place, tmp_path, f"{place}/upstream@*", place / "upstream/huggingface", "--tokens", "256", "--classes", 9)
    shown = capsys.readouterr().out
    assert "LogME at " in shown and "9 commonest" in shown and "upstream@20" in shown and "probe runs say" in shown
    assert [row["step"] for row in found] == [5, 10, 15, 20, None] and found[0]["tokens"] == 5 * 8 * 16
    logged = {event["step"]: event["loss"] for event in events(place / "upstream", "eval") if event["name"] == "old"}
    for row in found[:4]:  # the windows of a validation set are the same in every run
        assert row["loss_old"] == pytest.approx(logged[row["step"]], rel=1e-6)
    same = ("loss_new", "loss_old", "logme")
    assert [found[4][key] for key in same] == pytest.approx([found[3][key] for key in same], rel=1e-6)


def test_logme_is_that_of_the_states_before_the_head(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    choose = start_scores.choose_positions

    def watched(windows: Any, *settings: Any) -> Any:
        seen.append((np.concatenate(list(windows.slice(0).micro_batches(0, 1, 5))), choose(windows, *settings)))
        return seen[-1][1]

    monkeypatch.setattr("megarewarm.lab.choose_start.choose_positions", watched)
    words = [place / "upstream", place / "upstream/huggingface", "--positions", 100, "--classes", 7, "--micro-batch", 3]
    rows = scored(place, tmp_path, *words)
    ids, positions = seen[0]
    model = AutoModelForCausalLM.from_pretrained(place / "upstream/huggingface", dtype=torch.float32)
    with torch.no_grad():
        out = model(torch.from_numpy(ids[:, :-1]), output_hidden_states=True)
    states = out.hidden_states[-1].flatten(0, 1).numpy()  # after the last norm
    targets = ids[:, 1:].ravel()
    assert len(positions.places) == 100 and (targets[positions.places] == positions.targets).all()
    commonest = np.argsort(-np.bincount(targets, minlength=64), kind="stable")[:7]
    assert set(positions.targets) == set(commonest) and positions.share == pytest.approx(np.isin(targets, commonest).mean())
    wanted = logme(standardised(states[positions.places]), positions.targets)
    assert rows[1]["logme"] == pytest.approx(wanted, rel=1e-5)
    again = scored(place, tmp_path, *words)
    other = scored(place, tmp_path, *words, "--seed", 2)
    assert again == rows and other[0]["logme"] != rows[0]["logme"] and other[0]["loss_new"] == rows[0]["loss_new"]


@pytest.mark.slow
def test_probes_are_the_truth(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []

    def run_locally(arms: Sequence[Arm], words: Sequence[str], folder: Path, **settings: Any) -> Result:
        """In this process; that runs get theirs is tested in test_local.py."""
        assert yaml.safe_load(Path(words[0]).read_text())["runs"][0]["name"] == "01_upstream_5"
        for arm in arms:
            trained.append(arm.name)
            train(arm.config, ALONE, quiet())
        return Result(done=[arm.name for arm in arms])

    monkeypatch.setattr("megarewarm.lab.sweep.run_locally", run_locally)
    words = [f"{place}/upstream@*", "--probe", 4, "steps", "--with", place / "RUN.yml", "schedule.max_lr=3e-3"]
    words += ["training.global_batch=4"]
    rows = scored(place, tmp_path, *words)
    assert trained == ["01_upstream_5", "02_upstream_10", "03_upstream_15", "04_upstream_20"]
    for row, name in zip(rows, trained, strict=True):
        run = tmp_path / "probes" / name
        logged = events(run, "eval")
        losses = {(event["name"], event["step"]): event["loss"] for event in logged}
        for each in ("new", "old"):
            assert row[f"loss_{each}"] == pytest.approx(losses[each, 0], rel=1e-6)
            assert row[f"loss_{each}_after"] == losses[each, 4]
        assert events(run, "train")[-1]["step"] == 4 and events(run, "start")[0]["from"] == row["candidate"]
        assert max(event["lr"] for event in events(run, "train")) <= 3e-3
    shown = capsys.readouterr().out
    after = [row["loss_new_after"] for row in rows]
    for label, values in (
        ("LogME", [-row["logme"] for row in rows]),
        ("loss on new at the start", [row["loss_new"] for row in rows]),
        ("tokens trained on", [-row["tokens"] for row in rows]),
    ):
        assert f"  {label}: {kendalltau(values, after).statistic:.2f} (4 candidates)" in shown
    assert scored(place, tmp_path, *words) == rows and len(trained) == 4  # probes that are done stay


def test_what_can_not_be_compared_is_refused_before_work_begins(place: Path, tmp_path: Path) -> None:
    upstream, on = f"{place}/upstream@*", ["--on", str(place / "new")]
    out = ["--output", str(tmp_path / "out")]
    write_tokens(tmp_path / "wide", 1, vocabulary=200)
    run = mapping(place)
    (tmp_path / "experiment.yml").write_text(yaml.safe_dump({"experiment": "x", "base": run, "runs": [{"name": "a"}]}))
    with_run = ["--with", str(place / "RUN.yml")]
    for words, said in (
        ([f"{place}/upstream@20", *on], "is the only candidate"),
        ([f"{place}/upstream@3", upstream, *on], "is step 3, of which there is no checkpoint; there are 5, 10, 15, 20"),
        ([f"{place}/upstream@7*", upstream, *on], "no checkpoint matches; there are steps 5, 10"),
        ([f"{place}/upstream@soon", upstream, *on], "is no moment of a run"),
        ([f"{place}/down*", upstream, *on], "no folder matches"),
        ([str(place), upstream, *on], "is neither a run or checkpoint folder"),
        ([upstream, f"{place}/upstream@25%", *on], "is given twice"),
        ([upstream, "--on", str(tmp_path / "wide")], "can't be compared"),
        ([upstream, "--on", str(tmp_path / "none")], "none"),
        ([upstream, *on, "--and", str(place / "new")], "given twice"),
        ([upstream, *on, "--sequence-length", "17"], "expected 1 to 16"),
        ([upstream, *on, "--probe", "4"], "--with RUN.yml"),
        ([upstream, *on, *with_run], "with --probe"),
        ([upstream, *on, "--probe", "10%", *with_run], "such as '200 steps'"),
        ([upstream, *on, "--probe", "few", "steps", *with_run], "--probe few steps"),
        ([upstream, *on, "--probe", "4", "--with", str(tmp_path / "experiment.yml")], "takes the file of a single run"),
        ([upstream, *on, "--probe", "4", *with_run, "--sequence-length", "8"], "probe runs have data.sequence_length 16"),
    ):
        with pytest.raises(UserError) as error:
            main([*words, *out])
        assert said in str(error.value) and "\n" not in str(error.value), (words, str(error.value))
    assert not (tmp_path / "out").exists()


def test_a_candidate_that_is_not_finite_is_named(place: Path, tmp_path: Path) -> None:
    """Its loss would be the least, as nothing is less than what is no number."""
    broken = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(place / "upstream/huggingface")
    with torch.no_grad():
        next(model.parameters())[5] = torch.nan
    model.save_pretrained(broken)
    words = [str(broken), f"{place}/upstream@20", "--on", str(place / "new"), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match=f"{broken}: its loss on new is nan, so it is no start"):
        main(words)
    assert not (tmp_path / "out").exists()
