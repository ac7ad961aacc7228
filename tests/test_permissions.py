"""Every file and folder of a run, its exports, data, cache and report is made with the user's umask."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers

from megarewarm.checkpoint.convert import ConvertOptions, convert
from megarewarm.checkpoint.source import open_checkpoint
from megarewarm.data.order import samples
from megarewarm.data.text.preprocess.job import Options, preprocess
from megarewarm.data.text.tokenizers import train_bpe
from megarewarm.report.pages.run_page import report
from megarewarm.training.trainer import train
from tests.support.tiny import config, quiet
from tests.training.test_resume import ALONE


@pytest.fixture(params=[0o002, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_all_that_is_written_has_the_users_mode(tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "all"
    place.mkdir()
    monkeypatch.setenv("MEGAREWARM_CACHE", str(place / "cache"))
    monkeypatch.setattr(samples, "CACHED", 1)
    text = place / "a.txt"
    text.write_text("".join(f"{i * i} of {i * 7919 % 9973}\n<|endoftext|>\n" for i in range(500)))
    bpe = train_bpe(text.read_text().splitlines(), 300, place / "tokenizer" / "tokenizer.json")
    preprocess([text], bpe.path, place / "tokens" / "out", Options(split=(0.5, 0.5), shuffle=1), worker_count=1)
    run = config(
        place,
        data={"order": "neox", "train": [{"path": str(place / "new"), "max_epochs": None}]},
        training={"budget": 4},
        checkpoint={"every": 2},
        evaluation={"every": 2},
        logging={"tensorboard": True},
        export={"huggingface": True},
    )
    folder = train(run, ALONE, quiet()).folder
    report([folder], place / "report")
    source = open_checkpoint(str(folder))
    convert(source, place / "to_neox", ConvertOptions("neox"))
    convert(source, place / "to_own", ConvertOptions("megarewarm"))
    assert tokenizers.Tokenizer.from_file(str(bpe.path)).get_vocab_size() == bpe.vocab_size

    found = sorted(place.rglob("*"))
    names = {path.name for path in found}
    assert {"config.yaml", "metrics.jsonl", ".metadata", "model.safetensors", "arrays.json", "latest", "out_train.bin"} <= names
    for path in found:
        mode = path.lstat().st_mode
        wanted = (0o777 if stat.S_ISDIR(mode) else 0o666) & ~umask
        assert stat.S_IMODE(mode) == wanted, f"{path} has mode {stat.S_IMODE(mode):o}, expected {wanted:o}"
