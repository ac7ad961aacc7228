"""Checksums: every kind of damage is named and refused, by us as by sha256sum, alone and by several ranks."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from megarewarm.checkpoint.own import store, tensor_index
from megarewarm.checkpoint.own.folder import newest_whole
from megarewarm.checkpoint.own.integrity import SUMS_FILE, find_damage
from megarewarm.checkpoint.own.tensor_index import TensorIndexReader
from megarewarm.checkpoint.source import OwnCheckpoint, open_checkpoint
from megarewarm.errors import UserError
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.trainer import train
from tests.support.distributed import run_ranks
from tests.support.tiny import config, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("whole")
    return train(config(place, training={"budget": 2}, checkpoint={"every": 1}), ALONE, quiet()).folder


@pytest.fixture
def checkpoint(run_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(run_folder, tmp_path / "run")
    return tmp_path / "run" / "checkpoints" / "step_2"


FILES = ["state.json", ".metadata", "__0_0.distcp", SUMS_FILE]


def test_sha256sum_agrees(checkpoint: Path) -> None:
    assert sorted(file.name for file in checkpoint.iterdir()) == sorted(FILES)
    result = subprocess.run(["sha256sum", "--check", "--strict", SUMS_FILE], cwd=checkpoint, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.count(": OK") == 3
    assert find_damage(checkpoint) is None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found_wherever_it_is(checkpoint: Path, name: str, where: float, bit: int) -> None:
    file = checkpoint / name
    before = file.read_bytes()
    damaged = bytearray(before)
    damaged[int(where * len(before))] ^= 1 << bit
    file.write_bytes(damaged)
    try:
        assert find_damage(checkpoint) is not None
        with pytest.raises(UserError, match=str(checkpoint)):
            OwnCheckpoint(checkpoint).whole_model()
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["truncated", "missing", "emptied"])
def test_a_truncated_or_missing_file_is_named_and_the_older_one_used(checkpoint: Path, name: str, harm: str) -> None:
    file = checkpoint / name
    if harm == "missing":
        file.unlink()
    else:
        os.truncate(file, 0 if harm == "emptied" else file.stat().st_size // 2)
    damage = find_damage(checkpoint)
    assert damage is not None and (str(file) in damage or SUMS_FILE in damage)
    found, notes = newest_whole(checkpoint.parent)
    assert found == checkpoint.with_name("step_1")
    assert notes == [f"{damage}: the checkpoint of step 1 is used"]
    source = open_checkpoint(str(checkpoint.parent.parent))
    assert source.training is not None and source.training.step == 1 and source.notes == notes
    with pytest.raises(UserError):
        OwnCheckpoint(checkpoint).whole_model()  # the one that was asked for by its name is not replaced


def test_a_file_that_does_not_belong_there_is_noticed(checkpoint: Path) -> None:
    (checkpoint / "__1_0.distcp").write_bytes(b"of another checkpoint")
    assert "__1_0.distcp is not listed" in str(find_damage(checkpoint))


class _Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_an_index_that_wants_to_run_something_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """Checksums are no help against the one who wrote them."""
    (checkpoint / ".metadata").write_bytes(pickle.dumps(_Hostile(tmp_path / "ran")))
    with pytest.raises(UserError, match=r"it names (posix|os)\.system"):
        store.stored_tensors(checkpoint)
    with pytest.raises(UserError, match="system"):
        store.load(checkpoint, {"model.embed_in.weight": torch.empty(64, 32)})
    assert not (tmp_path / "ran").exists()


def test_an_index_is_read_once_for_all_tensors(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 83,000 slices takes ten seconds."""
    read: list[object] = []
    usual = tensor_index.read_index
    monkeypatch.setattr(tensor_index, "read_index", lambda file: read.append(file) or usual(file))
    tensor_index._mended.cache_clear()
    weights = OwnCheckpoint(checkpoint).weights
    whole = OwnCheckpoint(checkpoint).whole_model().state_dict()
    assert all(torch.equal(weights.read(name), whole[name]) for name in weights.describe()) and len(whole) > 9
    assert len(read) == 1


def _ranks_agree(ranks: Ranks, folder: str) -> tuple[str | None, list[str]]:
    found, notes = newest_whole(Path(folder))
    return (found.name if found else None), notes


def test_ranks_share_the_reading_and_agree(checkpoint: Path) -> None:
    file = checkpoint / "__0_0.distcp"
    with open(file, "r+b") as opened:
        opened.seek(1000)
        opened.write(b"\xff\x00\xff\x00")
    answers = run_ranks(_ranks_agree, 3, str(checkpoint.parent))
    note = f"{file} is damaged (its SHA-256 is not the one in {SUMS_FILE}): the checkpoint of step 1 is used"
    assert answers == [("step_1", [note])] * 3


class _Taking:
    """What is pickled as the getattr of something, as Python before 3.11.4 writes the members of an enumeration."""

    def __init__(self, owner: object, name: str) -> None:
        self._taken = getattr, (owner, name)

    def __reduce__(self) -> tuple[object, tuple[object, str]]:
        return self._taken


def test_an_index_of_an_older_python_is_read_and_its_getattr_reaches_nothing_else(checkpoint: Path) -> None:
    file = checkpoint / ".metadata"
    index = TensorIndexReader(checkpoint).read_metadata()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            _MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, _: _Taking(_MEM_FORMAT_ENCODING, self.name).__reduce__()
        )
        file.write_bytes(pickle.dumps(index))
    assert b"getattr" in file.read_bytes()
    assert TensorIndexReader(checkpoint).read_metadata().state_dict_metadata == index.state_dict_metadata
    for owner, name in ((torch.Size, "__new__"), (_MEM_FORMAT_ENCODING, "mro"), (_MEM_FORMAT_ENCODING, "__reduce_ex__")):
        file.write_bytes(pickle.dumps(_Taking(owner, name)))
        with pytest.raises(pickle.UnpicklingError, match="which no index of tensors needs; nothing of it was run"):
            TensorIndexReader(checkpoint).read_metadata()
