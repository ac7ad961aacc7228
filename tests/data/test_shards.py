"""A .bin in shards is the file itself: whatever is read, wherever the shards were cut."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.config.data import DataConfig
from megarewarm.data.files.file_bytes import FileBytes, JoinedBytes
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.files.token_file import TokenFileWriter, open_tokens
from megarewarm.data.mixture.batches import build_training_batches
from megarewarm.data.mixture.phases import Phase
from megarewarm.errors import UserError


def cut(whole: Path, size: int, *, inclusive: bool) -> list[Path]:
    """Shards of ``size`` bytes in place of ``whole``, numbered up to N as Pythia's, or up to N - 1."""
    data = whole.read_bytes()
    parts = [data[first : first + size] for first in range(0, len(data), size)]
    last = len(parts) - inclusive
    paths = [whole.with_name(f"{whole.stem}-{k:05}-of-{last:05}.bin") for k in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        path.write_bytes(part)
    whole.unlink()
    return paths


@settings(max_examples=60, deadline=None)
@given(data=st.binary(min_size=1, max_size=60), cuts=st.sets(st.integers(0, 60)), draw=st.data())
def test_joined_bytes_are_the_bytes(tmp_path_factory, data, cuts, draw):
    folder = tmp_path_factory.mktemp("joined")
    (folder / "x.bin").write_bytes(data)
    bounds = sorted({0, len(data)} | {at for at in cuts if at < len(data)})
    shards = []
    for k, (first, last) in enumerate(pairwise(bounds)):
        shards.append(folder / f"x-{k:05}-of-99999.bin")
        shards[-1].write_bytes(data[first:last])
    whole, joined = FileBytes(folder / "x.bin"), JoinedBytes(folder / "x.bin", shards)
    assert joined.size == whole.size == len(data)
    offsets = np.array(draw.draw(st.lists(st.integers(0, len(data)), min_size=1, max_size=5)))
    counts = np.array([draw.draw(st.integers(0, len(data) - offset)) for offset in offsets.tolist()])
    kind = np.dtype("u1")
    assert joined.gather(offsets, counts, kind).tobytes() == whole.gather(offsets, counts, kind).tobytes()
    assert joined.read(offsets[0], counts[0], kind).tobytes() == data[offsets[0] : offsets[0] + counts[0]]
    with pytest.raises(UserError, match="shorter while it was in use"):
        joined.read(0, len(data) + 1, kind)


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("size", [1000, 1001, 4098])
def test_pythias_rows_are_read_from_their_shards(tmp_path, inclusive, size):
    """Borders within a row and within an id."""
    rows = np.random.default_rng(0).integers(0, 50_000, (40, 65), dtype=np.uint16)
    rows.tofile(tmp_path / "document.bin")
    fingerprint = open_tokens(tmp_path / "document.bin", dtype="uint16").fingerprint()
    cut(tmp_path / "document.bin", size, inclusive=inclusive)
    data = DataConfig(sequence_length=64, train=[{"path": str(tmp_path / "document.bin"), "layout": "rows", "first_row": 5}])
    batches = build_training_batches(TokenFiles(data, 60_000), [Phase(0, data.train)], total_samples=35)
    assert np.array_equal(batches.rows(0, 35), rows[5:])
    assert open_tokens(tmp_path / "document.bin", dtype="uint16").fingerprint() == fingerprint


def test_a_pair_with_shards(tmp_path):
    documents = [np.arange(k, 3 * k) for k in range(50)]
    with TokenFileWriter(tmp_path / "text", np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
    cut(tmp_path / "text.bin", 777, inclusive=True)
    file = open_tokens(tmp_path / "text")
    assert [file.document(k).tolist() for k in range(50)] == [document.tolist() for document in documents]


def test_shards_that_are_not_whole(tmp_path):
    np.zeros(5000, np.uint16).tofile(tmp_path / "x.bin")
    shards = cut(tmp_path / "x.bin", 1000, inclusive=True)
    shards[3].rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"x-00003-of-00009.bin does not exist, other shards of x.bin do"):
        open_tokens(tmp_path / "x.bin", dtype="uint16")
    (tmp_path / "away").rename(shards[3])
    (tmp_path / "x-00000-of-00002.bin").write_bytes(b"12")
    with pytest.raises(UserError, match=r"shards of two divisions, -of-00002 and -of-00009"):
        open_tokens(tmp_path / "x.bin", dtype="uint16")
    (tmp_path / "x-00000-of-00002.bin").unlink()
    (tmp_path / "x-00010-of-00009.bin").write_bytes(b"12")
    with pytest.raises(UserError, match="one shard too many"):
        open_tokens(tmp_path / "x.bin", dtype="uint16")
    with pytest.raises(UserError, match=r"y.bin does not exist"):
        open_tokens(tmp_path / "y.bin", dtype="uint16")
