"""megarewarm select-data with the steps that ask a model, from the command line to its manifest and page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megarewarm.cli import score_data, select_data
from megarewarm.data.files.token_file import open_tokens
from megarewarm.errors import UserError
from tests.selection.test_scoring_model import VOCABULARY, neox, write


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and 40 documents, the last four of which are the first four again."""
    folder = tmp_path_factory.mktemp("select")
    neox(folder / "model")
    random = np.random.default_rng(5)
    documents = [random.integers(0, VOCABULARY, size) for size in random.integers(5, 90, 36)]
    write(folder / "data", [*documents, *documents[:4]])
    return folder


def select(place: Path, output: Path, *words: str) -> int:
    return select_data.main([str(place / "data"), "--output", str(output), "--device", "cpu", *words])


def contents(prefix: Path) -> list[bytes]:
    file = open_tokens(prefix)
    return [file.document(document).tobytes() for document in range(file.num_documents)]


def test_the_steps_follow_each_other(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = str(place / "model"), tmp_path / "out"
    steps = ["--semantic", "0.9", "--diverse", "0.5", "--embed", model, "--clusters", "1"]
    steps += ["--score", "loss", "--by", model, "--drop-easiest", "25%"]
    assert select(place, out, *steps, "--dry-run") == 0 and not (tmp_path / "out.bin").exists()
    page = (tmp_path / "out.selection.html").read_text()
    assert page.count("documents by their states") >= 2 and "the most prototypical" in page and "the highest scores" in page
    assert select(place, out, *steps) == 0
    said = json.loads((tmp_path / "out.selection.json").read_text())
    assert [step["name"] for step in said["steps"]] == ["semantic", "diverse", "score"]
    assert all(model in json.dumps(step["settings"]) for step in said["steps"])
    kept, all_of_them = contents(out), contents(place / "data")
    # 36 of 40: the four copies go; 18 of 36; of 18 the percentile at 25 % is between the 5th and the 6th
    assert len(kept) == len(set(kept)) == 13 and set(kept) <= set(all_of_them)
    assert "4 of 40 documents go, of a cosine of 1.0000 or more" in capsys.readouterr().out


def test_a_score_file_is_the_loss(place: Path, tmp_path: Path) -> None:
    model, scores = str(place / "model"), str(tmp_path / "scores")
    score_data.main([str(place / "data"), "--with", model, "--output", scores, "--device", "cpu"])
    for name, words in (("a", ["--score", "loss", "--by", model]), ("b", ["--score", scores])):
        assert select(place, tmp_path / name, *words, "--keep-middle", "50%") == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b") and len(contents(tmp_path / "a")) < 25


def test_bad_input_is_one_line_and_writes_nothing(place: Path, tmp_path: Path) -> None:
    model = str(place / "model")
    for words, message in (
        (["--semantic", "0.5", "--embed", model, "--clusters", "41"], "--clusters 41: expected at most 40"),
        (["--diverse", "0.5", "--embed", str(place / "none")], "none"),
        (["--score", "loss", "--by", str(place / "none"), "--drop-hardest", "5%"], "none"),
        (["--score", str(place / "none"), "--drop-hardest", "5%"], r"none\.safetensors does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            select(place, tmp_path / "out", *words)
    assert not list(tmp_path.iterdir())
