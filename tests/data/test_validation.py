"""Validation windows: always the same tokens, each once over all ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.config.data import DataConfig, ValidationSet
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.files.token_file import TokenFileWriter
from megarewarm.data.mixture.validation import ValidationWindows
from megarewarm.errors import UserError

S = 4


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    found = []
    for i, tokens in enumerate((401, 805)):
        with TokenFileWriter(folder / "ab"[i], np.uint16) as writer:
            for start in range(0, tokens, 50):
                writer.add_document(1000 * i + np.arange(start, min(start + 50, tokens)))
        found.append(str(folder / "ab"[i]))
    return found


def windows(sources: list[dict], tokens: int, vocab_size: int = 2000, **data: object) -> ValidationWindows:
    config = DataConfig(sequence_length=S, train=sources, **data)
    chosen = ValidationSet(name="held_out", role="upstream", sources=sources, tokens=tokens)
    return ValidationWindows(chosen, TokenFiles(config, vocab_size))


def rows(made: ValidationWindows, rank: int = 0, world: int = 1, micro_batch: int = 7) -> list[list[int]]:
    return [row for batch in made.slice(0).micro_batches(rank, world, micro_batch) for row in batch.tolist()]


def test_windows_are_the_same_in_every_run(paths):
    sources = [{"path": path} for path in paths]
    made = windows(sources, 130)
    assert (made.num_windows, made.num_tokens, made.name, made.role) == (32, 128, "held_out", "upstream")
    expected = rows(made)
    assert rows(made) == expected  # at every evaluation
    for data in ({"seed": 99}, {"order": "neox"}, {"order": "megatron"}):
        other = windows(sources, 130, **data)
        assert rows(other) == expected
    assert rows(windows(sources, 64)) == expected[:16]  # fewer tokens: the first of them
    assert rows(windows(sources[:1], 64)) != rows(windows(sources, 64)) != rows(windows(sources[::-1], 64))


def test_windows_are_frozen(paths):
    # Losses of different versions are comparable only as long as these don't change.
    assert [row[0] for row in rows(windows([{"path": path} for path in paths], 32))] == [
        88,
        1228,
        248,
        1316,
        392,
        1072,
        52,
        1796,
    ]


def test_rows_are_whole_windows_blended_by_weight_none_twice(paths):
    made = windows([{"path": paths[0], "weight": 3}, {"path": paths[1]}], 100 * S)
    found = np.array(rows(made))
    assert found.shape == (100, S + 1) and (np.diff(found, axis=1) == 1).all()
    assert np.bincount(found[:, 0] // 1000).tolist() == [75, 25]
    assert len(np.unique(found[:, 0])) == 100


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 60), world=st.integers(1, 20), micro_batch=st.integers(1, 9))
def test_the_ranks_cover_each_window_once(paths, count, world, micro_batch):
    made = windows([{"path": path} for path in paths], count * S)
    shares = [made.slice(0).share(rank, world) for rank in range(world)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    together = [row for rank in range(world) for row in rows(made, rank, world, micro_batch)]
    assert together == rows(made)
    for rank in range(world):
        sizes = [len(batch) for batch in made.slice(0).micro_batches(rank, world, micro_batch)]
        assert all(size == micro_batch for size in sizes[:-1]) and 0 not in sizes
        assert sum(sizes) == len(shares[rank])


def test_capped_at_one_epoch_of_every_source(paths):
    assert windows([{"path": paths[0]}], 10**9).num_windows == 100
    (note,) = windows([{"path": paths[0]}], 10**9).notes
    assert "'held_out' is evaluated on 400 tokens, not on the 1,000,000,000 asked for" in note
    assert windows([{"path": paths[0]}], 403).notes == []  # whole windows, as asked
    # a has 100 windows, b 201: at equal weights a is used up first.
    made = windows([{"path": paths[0]}, {"path": paths[1]}], 10**9)
    assert made.num_windows == 200 and "'a' is used up first" in made.notes[0]
    starts = [row[0] for row in rows(made)]
    assert len(set(starts)) == 200 and set(range(0, 400, S)) < set(starts)
    assert windows([{"path": paths[0], "max_epochs": 0.25}], 10**9).num_windows == 25
    assert windows([{"path": paths[0], "max_epochs": None}], 10**9).num_windows == 100
    assert windows([{"path": paths[0], "max_epochs": 3}], 10**9).num_windows == 100


def test_split_part(paths):
    source = {"path": paths[1], "split": "90,10", "part": "valid"}
    starts = np.array(rows(windows([source], 10**9)))[:, 0]
    assert starts.min() >= 1000 + 15 * 50  # 17 documents, of which the last two or one are for validation


def test_errors(paths):
    with pytest.raises(UserError, match="'held_out' comes to no whole window of 4 tokens"):
        windows([{"path": paths[0]}], 3)
    with pytest.raises(UserError, match="comes to no whole window"):
        windows([{"path": paths[0], "max_epochs": 0.001}], 100)
    with pytest.raises(UserError, match="outside of the model's vocabulary"):
        windows([{"path": paths[1]}], 100, vocab_size=1000)
    with pytest.raises(UserError, match="does not exist"):
        windows([{"path": str(Path(paths[0]).with_name("none"))}], 100)
    with pytest.raises(ValueError, match="no share"):
        windows([{"path": paths[0]}], 100).slice(0).share(2, 2)
