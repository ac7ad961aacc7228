"""Finished samples, as Pythia's data order is published: files written by NumPy, read back row by row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megarewarm.config.data import DataConfig
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.files.token_file import TokenFileWriter
from megarewarm.data.mixture.batches import TrainingBatches, build_training_batches
from megarewarm.data.mixture.phases import Phase
from megarewarm.errors import UserError

S = 8


def rows_in(path: Path, count: int, seed: int = 0) -> np.ndarray:
    """A bare file of rows of S + 1 ids."""
    rows = np.random.default_rng(seed).integers(0, 60_000, (count, S + 1)).astype(np.uint16)
    rows.tofile(path)
    return rows


def batches(*sources: dict[str, object], total: int, **more: object) -> TrainingBatches:
    data = DataConfig.model_validate({"sequence_length": S, "train": list(sources), **more})
    return build_training_batches(TokenFiles(data, 60_000), [Phase(0, data.train)], total_samples=total)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 40), first_row=st.integers(0, 39), order=st.sampled_from(["permuted", "neox", "megatron"]))
def test_rows_come_in_the_order_of_the_file(tmp_path: Path, count: int, first_row: int, order: str) -> None:
    rows = rows_in(tmp_path / "a.bin", count)
    source = {"path": f"{tmp_path}/a.bin", "layout": "rows", "first_row": first_row}
    if first_row >= count:
        with pytest.raises(UserError, match=f"has {count} rows, 'first_row' is {first_row}"):
            batches(source, total=1)
        return
    left = count - first_row
    run = batches(source, total=left, order=order)
    assert np.array_equal(run.rows(0, left), rows[first_row:])
    assert np.array_equal(run.rows(left // 2, left - left // 2), rows[first_row + left // 2 :]), "from any position on"


def test_with_an_index_whose_documents_are_the_rows(tmp_path: Path) -> None:
    rows = rows_in(tmp_path / "bare.bin", 12)
    with TokenFileWriter(tmp_path / "pair", np.uint16) as writer:
        for row in rows:
            writer.add_document(row)
    whole = batches({"path": f"{tmp_path}/pair", "layout": "rows"}, total=12)
    assert np.array_equal(whole.rows(0, 12), rows)
    part = batches({"path": f"{tmp_path}/pair", "layout": "rows", "split": "6,6", "part": "valid"}, total=6)
    assert np.array_equal(part.rows(0, 6), rows[6:])


def test_in_a_blend_with_a_permuted_source(tmp_path: Path) -> None:
    rows = rows_in(tmp_path / "old.bin", 10)
    new = np.arange(1000, 1000 + 31 * S, dtype=np.uint16)
    new.tofile(tmp_path / "new.bin")
    sources = [
        {"path": f"{tmp_path}/new.bin", "weight": 0.75},
        {"path": f"{tmp_path}/old.bin", "weight": 0.25, "layout": "rows"},
    ]
    found = batches(*sources, total=40).rows(0, 40)
    is_new = (np.diff(found, axis=1) == 1).all(axis=1)
    assert np.array_equal(found[~is_new], rows) and is_new.sum() == 30
    assert len(np.unique(found[is_new, 0])) == 30


def test_more_rows_than_there_are(tmp_path: Path) -> None:
    rows = rows_in(tmp_path / "a.bin", 5)
    source: dict[str, object] = {"path": f"{tmp_path}/a.bin", "layout": "rows"}
    with pytest.raises(UserError, match=r"gives 5 samples .* the run needs 6 .* max_epochs to 1\.2 or more"):
        batches(source, total=6)
    again = batches(source | {"max_epochs": 2.0}, total=10).rows(0, 10)
    assert np.array_equal(again, np.concatenate([rows, rows]))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    rows_in(tmp_path / "a.bin", 5)
    source = {"path": f"{tmp_path}/a.bin", "layout": "rows"}
    with pytest.raises(UserError, match=r"45 tokens, no whole number of rows of 8: .* data\.sequence_length"):
        data = DataConfig.model_validate({"sequence_length": 7, "train": [source]})
        build_training_batches(TokenFiles(data, 60_000), [Phase(0, data.train)], total_samples=1)
    with pytest.raises(ValueError, match="'first_row' belongs to layout 'rows'"):
        batches({"path": "a", "first_row": 3}, total=1)
    with pytest.raises(ValueError, match="'eval' reads windows"):
        validation = [{"name": "eval", "tokens": 8, "sources": [source]}]
        DataConfig.model_validate({"sequence_length": S, "train": [source], "validation": validation})


def test_the_first_row_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    rows_in(tmp_path / "a.bin", 5)
    source = {"path": f"{tmp_path}/a.bin", "layout": "rows"}
    prints = {batches(source | {"first_row": first}, total=1).fingerprint() for first in (0, 1)}
    assert len(prints) == 2
