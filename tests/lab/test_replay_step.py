"""A step computed again is the step that was made: against the run's own record, its rows, and autograd on the plain model."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from megarewarm.data.files.token_file import open_tokens
from megarewarm.errors import UserError
from megarewarm.lab.replay_step import _groups, replay_step, show
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.trainer import train
from tests.support.tiny import config, events, printed, quiet
from tests.training.test_bad_steps import Faults

ROOT = Path(__file__).resolve().parents[2]
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("replay")
    return train(config(place), ALONE, quiet()).folder


@pytest.mark.parametrize("step", [1, 5, 6, 13, 20])
def test_any_step_comes_out_as_recorded(trained: Path, step: int) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    again = replay_step(trained, step, ALONE)
    line = next(line for line in events(trained, "train") if line["step"] == step)
    assert (again.loss, again.norm) == (line["loss"], line["grad_norm"]) == again.recorded
    assert again.since == (step - 1) // 5 * 5 and again.differing == []
    assert np.mean(again.row_losses) == pytest.approx(line["loss"], rel=1e-6)
    total = math.sqrt(sum(group["grad_norm"] ** 2 for group in again.groups.values()))
    assert total == pytest.approx(line["grad_norm"], rel=1e-6)
    assert all(group["bad_weights"] == group["bad_gradients"] == 0 for group in again.groups.values())
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before
    console = quiet()
    show(again, console)
    text = printed(console)
    narrow = Console(file=io.StringIO(), width=60)  # where the excerpt is cut, and nothing else
    show(again, narrow)
    assert f"{max(again.row_losses):.4f}" in printed(narrow)
    assert "bit for bit as logged" in text and "layers.1" in text


def test_its_rows_are_those_of_the_step(trained: Path) -> None:
    again = replay_step(trained, 3, ALONE)
    for text, place in zip(again.texts, again.places, strict=True):
        file = open_tokens(place.path)
        parts = [file.document(part.document)[part.offset : part.offset + part.tokens] for part in place.parts]
        assert text == " ".join(map(str, np.concatenate(parts)[:16].tolist()))


def test_without_a_step_the_newest_bad_one_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Faults(monkeypatch, {7: "gradient", 8: "gradient"})
    folder = train(config(tmp_path), ALONE, quiet()).folder
    monkeypatch.undo()
    again = replay_step(folder, None, ALONE)
    assert again.step == 7 and again.recorded is not None and again.recorded[1] is None
    console = quiet()
    show(again, console)
    assert "does not recur" in printed(console)
    # and one that does recur: the parts that are not finite are counted
    Faults(monkeypatch, {2: "gradient"})
    broken = replay_step(folder, 7, ALONE)
    assert math.isnan(broken.norm) and sum(group["bad_gradients"] for group in broken.groups.values()) == 1
    assert broken.as_json()["norm"] is None and json.loads(json.dumps(broken.as_json(), allow_nan=False))


def test_norms_beyond_fp32_squares_and_large_counts_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of 3e20 is finite, its square no fp32 number; nor is 2^24 + 1."""
    weight = torch.nn.Parameter(torch.full((2,), 2e19))
    weight.grad = torch.tensor([3e20, torch.inf])
    known = {"embed_in.weight": SimpleNamespace(group="embed_in")}
    every, part = {"embed_in.weight": weight}, lambda name, values: values
    model: Any = SimpleNamespace(cards=known, parameters=every, trained=every, unique_shard=part, unique_trained=part)
    several = 2**24 + 1  # ranks
    monkeypatch.setattr("megarewarm.lab.replay_step.all_reduce_sums", lambda sums: [several * value for value in sums])
    (found,) = _groups(SimpleNamespace(model=model, scaler=None)).values()  # type: ignore[arg-type]
    assert found["bad_gradients"] == several
    assert found["grad_norm"] == pytest.approx(3e20 * several**0.5, rel=1e-6)
    assert found["weight_norm"] == pytest.approx(2e19 * (2 * several) ** 0.5, rel=1e-6)


def test_steps_and_folders_that_are_not_there(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--step 21: expected 1 to 20, the steps of the run"):
        replay_step(trained, 21, ALONE)
    with pytest.raises(UserError, match=r"metrics\.jsonl|not a run folder"):
        replay_step(tmp_path, 1, ALONE)


@pytest.mark.slow
@pytest.mark.launch
def test_as_a_command(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    command = [sys.executable, str(ROOT / "tools/replay_batch.py"), str(trained), "--step", "7", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    assert "bit for bit as logged" in result.stdout
    written = json.loads(out.read_text())
    assert len(written["rows"]) == 8 and written["rows"][0]["parts"][0]["tokens"] > 0
    refused = subprocess.run([*command[:3], "--step", "0"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
