"""A dry run refuses what the start would refuse: the same line, code 2, before anything is trained or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from megarewarm.main import main

Case = dict[str, Any]

# What is wrong -> (changes of a small run that would train, a part of the line).
BAD: dict[str, tuple[Case, str]] = {
    "too few tokens": ({"training": {"budget": 5000}}, "max_epochs"),
    "a vocabulary that is too small": ({"model": {"vocab_size": 7}}, "vocabulary"),
    "a token file that is not here": ({"data": {"train": [{"path": "nowhere"}]}}, "nowhere"),
    "a validation file that is not here": (
        {"data": {"validation": [{"name": "v", "tokens": 64, "sources": [{"path": "nowhere"}]}]}},
        "nowhere",
    ),
    "a start that is not here": ({"start": {"from": "no_such_folder"}}, "no_such_folder"),
    "heads that tensor ranks can't share": ({"parallel": {"tensor": 3}}, "parallel.tensor"),
    "more stages than layers": ({"parallel": {"pipeline": 8}}, "pipeline"),
    "a batch that ranks can't share": ({"parallel": {"data": 3}}, "training.global_batch"),
    "a GPU where there is none": ({"training": {"device": "cuda"}}, "training.device"),
    "a best set that doesn't exist": ({"checkpoint": {"keep_best": "nothing"}}, "keep_best"),
    "a tokenizer that is not here": ({"data": {"tokenizer": "no.json"}}, "no.json"),
    "an end outside of the vocabulary": ({"data": {"eod": 10_000, "mask_eod_loss": True}}, "data.eod"),
    "replay of too few tokens": (
        {"replay": {"fraction": 0.9, "sources": [{"name": "again", "path": "@tokens", "max_epochs": 0.01}]}},
        "max_epochs",
    ),
    "replay of a lineage that isn't there": ({"replay": {"fraction": 0.1, "of": "lineage"}}, "lineage"),
    "moments that nothing holds": ({"start": {"moments": "keep"}}, "start.moments"),
    "a logger that is not installed": ({"logging": {"wandb": {"project": "x"}}}, "wandb"),
    "warmup longer than the run": ({"schedule": {"warmup": "5000 steps"}}, "warmup"),
}


def _file(place: Path, changes: Case) -> Path:
    mapping = tiny.merge(tiny.mapping(place), changes)
    path = place / "run.yml"
    text = yaml.safe_dump(mapping).replace("'@tokens'", str(mapping["data"]["train"][0]["path"]))
    path.write_text(text.replace("@tokens", str(mapping["data"]["train"][0]["path"])))
    return path


def _files(place: Path) -> set[Path]:
    return {path for path in place.rglob("*") if path.name != "run.yml"}


@pytest.mark.parametrize("what", BAD)
def test_a_dry_run_refuses_what_the_start_refuses(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, part = BAD[what]
    path = _file(tmp_path, changes)
    monkeypatch.chdir(tmp_path)
    before = _files(tmp_path)
    assert main([str(path), "--dry-run"]) == 2
    ahead = capsys.readouterr().err
    assert part in ahead and "Traceback" not in ahead and ahead.count("\n") == 1, ahead
    assert _files(tmp_path) == before
    if "parallel" in changes:
        return  # the start has one rank here, and says that first
    assert main([str(path)]) == 2
    assert capsys.readouterr().err == ahead
    assert _files(tmp_path) == before


def test_a_folder_that_holds_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _file(tmp_path, {"training": {"budget": 2}})
    assert main([str(path)]) == 0
    capsys.readouterr()
    lines = []
    for words in (["--dry-run"], []):
        assert main([str(path), "schedule.max_lr=0.5", *words]) == 2
        lines.append(capsys.readouterr().err)
    assert lines[0] == lines[1] and "max_lr" in lines[0]


def test_what_is_not_here_may_be_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _file(tmp_path, BAD["a token file that is not here"][0])
    assert main([str(path), "--dry-run", "--allow-missing"]) == 0
    assert "not here, needed to train" in capsys.readouterr().out
    assert main([str(path), "--allow-missing"]) == 2
    assert "--allow-missing goes with --dry-run" in capsys.readouterr().err
