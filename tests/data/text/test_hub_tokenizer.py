"""A hub name wherever a tokenizer is asked for: out of a cache laid out as huggingface_hub does, without a network."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from megarewarm.checkpoint.tokenizer_source import named_tokenizer
from megarewarm.data.text.hub_tokenizer import local_tokenizer
from megarewarm.data.text.preprocess.job import preprocess
from megarewarm.data.text.tokenizers import load_tokenizer, train_bpe
from megarewarm.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a model whose tokenizer is in the cache."""
    cache = tmp_path / "cache"
    folder = cache / "models--Some-Body--model-1b" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (cache / "models--Some-Body--model-1b" / "refs").mkdir()
    (cache / "models--Some-Body--model-1b" / "refs" / "main").write_text(COMMIT)
    train_bpe(["some text of a few words " * 20], 260, folder / "tokenizer.json")
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: real(*a, **k, cache_dir=cache))
    return "Some-Body/model-1b"


def test_it_is_the_cached_file_everywhere(cached: str, tmp_path: Path) -> None:
    file = load_tokenizer(cached).path
    assert file.name == "tokenizer.json" and file.parent.name == COMMIT
    assert load_tokenizer(f"{cached}@main").path == named_tokenizer(cached, "data.tokenizer") == file
    (tmp_path / "a.txt").write_text("some words")
    (written,) = preprocess([tmp_path / "a.txt"], cached, tmp_path / "out", worker_count=1)
    assert written.counts.tokens == len(load_tokenizer(file).encode_batch(["some words"])[0]) + 1


def test_what_is_there_and_what_is_a_file_is_not_looked_for(
    cached: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Some-Body" / "model-1b").mkdir(parents=True)
    for name in (cached, "tokens/a.json", "a.json", "/a/b", "x"):
        assert local_tokenizer(name) == Path(name)


def test_one_that_can_t_be_had(cached: str) -> None:
    with pytest.raises(UserError, match=r"Some-Body/other does not exist, .* hub can't be had .*hf download Some-Body/other"):
        load_tokenizer("Some-Body/other")
