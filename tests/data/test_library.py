"""The token files of a run are opened and checked once, whoever reads them and however they are spelled."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from megarewarm.config.data import DataConfig, Source
from megarewarm.data.files import library
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.files.token_file import TokenFile, open_tokens
from megarewarm.errors import UserError
from megarewarm.parallel.ranks import Ranks
from megarewarm.rewarm.replay import check_apart
from megarewarm.training.trainer import train
from tests.support.tiny import config, quiet, write_tokens

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, Counter[str]]:
    """How often each file is opened, and how often its ids are checked."""
    done: dict[str, Counter[str]] = {"opened": Counter(), "checked": Counter()}
    check = TokenFile.check_vocabulary

    def opened(path: str, **options: object) -> TokenFile:
        done["opened"][Path(path).name] += 1
        return open_tokens(path, **options)  # type: ignore[arg-type]

    def checked(file: TokenFile, vocab_size: int) -> None:
        done["checked"][file.path.stem] += 1
        check(file, vocab_size)

    monkeypatch.setattr(library, "open_tokens", opened)
    monkeypatch.setattr(TokenFile, "check_vocabulary", checked)
    return done


def test_each_file_of_a_run_is_opened_and_checked_once(tmp_path: Path, work: dict[str, Counter[str]]) -> None:
    held_out = {"path": str(tmp_path / "old"), "split": "9,1,0", "part": "valid"}
    sets = [
        {"name": name, "role": role, "tokens": 256, "sources": [source]}
        for name, role, source in (
            ("old", "upstream", held_out),
            ("again", "upstream", held_out | {"path": str(tmp_path / "old")}),
            ("new", "downstream", {"path": str(tmp_path / "new")}),
        )
    ]
    start = train(config(tmp_path, name="first", folder=str(tmp_path / "first"), training={"budget": 2}), ALONE, quiet())
    assert start.losses and work["opened"] == work["checked"] == {"old": 1, "new": 1}
    for counter in work.values():
        counter.clear()
    old = held_out | {"part": "train", "max_epochs": None}
    train(
        config(
            tmp_path,
            start={"from": str(tmp_path / "first"), "intent": "rewarm"},
            replay={"fraction": 0.25, "sources": [old], "of": None},
            data={"validation": sets},
            training={"budget": 2},
        ),
        ALONE,
        quiet(),
    )
    assert work["opened"] == work["checked"] == {"old": 1, "new": 1}
    for counter in work.values():
        counter.clear()
    train(
        config(
            tmp_path,
            name="third",
            folder=str(tmp_path / "third"),
            start={"from": str(tmp_path / "first"), "intent": "rewarm"},
            replay={"fraction": 0.25, "of": "lineage"},
            training={"budget": 2},
        ),
        ALONE,
        quiet(),
    )
    # a lineage spells the file "new" by its .bin and the type of its ids
    assert work["opened"] == {"old": 1, "new": 1, "new.bin": 1} and work["checked"] == {"old": 1, "new": 1}


def test_spellings_of_a_file_are_one_file(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "a", 1)
    files = TokenFiles(DataConfig(sequence_length=16, train=[{"path": path}]), 64)
    same = {files.open(path), files.open(path + ".bin"), files.open(path + ".idx"), files.open(path, "uint16")}
    assert len(same) == 1 and same == {files.view(Source(path=path, split="9,1,0")).file}
    (tmp_path / "bare.bin").write_bytes(bytes(64))
    bare = str(tmp_path / "bare.bin")
    assert files.open(bare) is files.open(bare, "uint16") is not files.open(bare, "uint32")
    with pytest.raises(UserError, match=r"bare\.idx does not exist"):
        files.open(bare.removesuffix(".bin"))


def test_a_file_with_ids_outside_of_the_vocabulary_is_refused_each_time(tmp_path: Path) -> None:
    source = Source(path=write_tokens(tmp_path / "a", 1))
    files = TokenFiles(DataConfig(sequence_length=16, train=[source]), 50)
    for _ in range(2):
        with pytest.raises(UserError, match="outside of the model's vocabulary of 50 ids"):
            files.view(source)


def test_without_replay_no_upstream_set_is_opened(tmp_path: Path, work: dict[str, Counter[str]]) -> None:
    data = config(tmp_path).data
    check_apart(TokenFiles(data, 64), [])
    assert not work["opened"]
