"""Token files that change between stop and resume, anywhere and with their old size and time of change."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from megarewarm.checkpoint.source import open_checkpoint
from megarewarm.config.data import ReplayConfig
from megarewarm.config.schema import RunConfig
from megarewarm.data.files import token_file
from megarewarm.data.files.file_identity import FileIdentity, identity_of
from megarewarm.data.files.index_file import HEADER
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.files.token_file import TokenFileWriter, open_tokens
from megarewarm.errors import UserError
from megarewarm.parallel.ranks import Ranks
from megarewarm.rewarm.replay import seen_sources
from megarewarm.training import trainer
from megarewarm.training.trainer import train
from tests.support.tiny import VOCABULARY, config, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))
TOKENS = 6_000_000  # 11 MiB: of a file above 4 the fingerprint is of samples
PLACES = [0, 40_000, *np.random.default_rng(0).integers(0, TOKENS, 4).tolist(), TOKENS - 1]


class Killed(Exception):
    """Stands for a kill."""


def write(prefix: Path, seed: int) -> str:
    random = np.random.default_rng(seed)
    with TokenFileWriter(prefix, np.uint16) as writer:
        for _ in range(1000):
            writer.add_document(random.integers(0, VOCABULARY, TOKENS // 1000))
    return str(prefix)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that was killed after step 5, with its files 'train' and 'held'."""
    place = tmp_path_factory.mktemp("stopped")
    validation = [{"name": "held", "role": "upstream", "tokens": 256, "sources": [{"path": write(place / "held", 2)}]}]
    data = {"train": [{"path": write(place / "train", 1)}], "validation": validation}
    run = config(place, data=data, checkpoint={"every": 5}, training={"budget": 10, "global_batch": 2, "micro_batch": 2})
    original = trainer.training_step

    def step_or_die(run, lr):
        if run.step == 5:
            raise Killed
        return original(run, lr)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "training_step", step_or_die)
        with pytest.raises(Killed):
            train(run, ALONE, quiet())
    return run


@contextmanager
def changed(path: Path, offset: int, new: bytes) -> Iterator[None]:
    """The file with other bytes at ``offset``, of its old size and time of change."""
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(offset)
        old = file.read(len(new))
        assert old != new
        file.seek(offset)
        file.write(new)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    try:
        yield
    finally:
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(old)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def place_of(run: RunConfig, name: str) -> Path:
    return Path(run.run_folder).parent / name


def another(path: Path, token: int) -> bytes:
    (old,) = np.fromfile(path, "<u2", 1, offset=2 * token)
    return struct.pack("<H", (int(old) + 1) % VOCABULARY)


@pytest.mark.parametrize("token", PLACES)
def test_one_token_of_the_training_data(stopped: RunConfig, token: int) -> None:
    path = place_of(stopped, "train.bin")
    with changed(path, 2 * token, another(path, token)), pytest.raises(UserError) as told:
        train(stopped, ALONE, quiet())
    assert "step_5" in str(told.value) and "restore the old file" in str(told.value)


@pytest.mark.parametrize("token", PLACES)
def test_one_token_of_a_validation_set(stopped: RunConfig, token: int) -> None:
    path = place_of(stopped, "held.bin")
    message = r"held\.bin: changed since .*step_5 was saved .*validation set 'held'"
    with changed(path, 2 * token, another(path, token)), pytest.raises(UserError, match=message):
        train(stopped, ALONE, quiet())


@pytest.mark.parametrize("document", [0, 1, 500, 998])
def test_where_a_document_ends(stopped: RunConfig, document: int) -> None:
    """An index that is right in itself, of other documents over the same ids."""
    path, size = place_of(stopped, "train.idx"), TOKENS // 1000
    sizes = struct.pack("<2i", size + 1, size - 1)
    pointer = struct.pack("<q", 2 * ((document + 1) * size + 1))
    with (
        changed(path, HEADER.size + 4 * document, sizes),
        changed(path, HEADER.size + 4 * 1000 + 8 * (document + 1), pointer),
        pytest.raises(UserError, match=r"step_5.*restore the old file"),
    ):
        train(stopped, ALONE, quiet())


def test_of_a_large_file_what_samples_and_manifests_say(stopped: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file above 256 MiB: the documents are compared whole, the ids by samples; and the manifest's sum of all of them."""
    path, manifest = place_of(stopped, "train.bin"), place_of(stopped, "train.json")
    monkeypatch.setattr(token_file, "SCAN_WHOLE", 2**20)
    monkeypatch.setattr(token_file, "SAMPLED_BLOCKS", 2)
    said = {"tokens": TOKENS, "dtype": "uint16", "documents": 1000, "sha256": {"bin": "a" * 64}}
    manifest.write_text(json.dumps(said))
    before = identity_of(open_tokens(path))
    with changed(path, TOKENS, another(path, TOKENS // 2)):  # in the middle, where no sample is
        assert identity_of(open_tokens(path)).agrees_with(before)
        manifest.write_text(json.dumps(said | {"sha256": {"bin": "b" * 64}}))
        assert identity_of(open_tokens(path)).differing(before) == "SHA-256 of its manifest aaaaaaaa then, bbbbbbbb now"
    manifest.unlink()
    with changed(path, 2, another(path, 1)):
        assert not identity_of(open_tokens(path)).agrees_with(before)


def test_a_replay_of_what_was_read(stopped: RunConfig) -> None:
    path, token = place_of(stopped, "train.bin"), 3_066_818
    history = open_checkpoint(str(Path(stopped.run_folder) / "checkpoints" / "step_5")).lineage
    (source,) = seen_sources(ReplayConfig(fraction=0.1, of="lineage"), history)
    assert source.open(TokenFiles(stopped.data, VOCABULARY)).samples_per_epoch == 10
    with (
        changed(path, 2 * token, another(path, token)),
        pytest.raises(UserError, match="not the file that was read as 'train'"),
    ):
        source.open(TokenFiles(stopped.data, VOCABULARY))


def test_what_earlier_versions_recorded_is_compared_as_far_as_it_goes() -> None:
    old, new = FileIdentity(path="a", fingerprint="f"), FileIdentity(path="b", fingerprint="f", checksum="1", sha256="2")
    assert old.agrees_with(new) and new.agrees_with(old)
    assert not new.agrees_with(new.model_copy(update={"checksum": "2"})) and not old.agrees_with(
        FileIdentity(path="a", fingerprint="g")
    )


def test_files_that_were_only_touched_or_moved_are_the_same(stopped: RunConfig) -> None:
    for name in ("train", "held"):
        for suffix in ("bin", "idx"):
            os.utime(place_of(stopped, f"{name}.{suffix}"), (1, 1))
    assert train(stopped, ALONE, quiet()).step == 10
