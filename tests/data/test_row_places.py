"""The places of rows, put together again from the documents, are the rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megarewarm.config.load import validate
from megarewarm.config.schema import RunConfig
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.files.token_file import TokenFileWriter, open_tokens
from megarewarm.data.mixture.batches import TrainingBatches, build_training_batches
from megarewarm.data.mixture.phases import Phase
from megarewarm.data.order.row_places import runs_of
from tests.support.tiny import mapping


def batches(place: Path, order: str) -> TrainingBatches:
    data = {
        "order": order,
        "train": [{"path": str(place / "old"), "max_epochs": 9}, {"path": str(place / "new"), "max_epochs": 9}],
    }
    config = validate(RunConfig, mapping(place, data=data), {})
    return build_training_batches(TokenFiles(config.data, 64), [Phase(0, config.data.train)], total_samples=160)


@pytest.mark.parametrize("order", ["permuted", "neox", "megatron"])
def test_documents_of_a_batch_give_its_rows(tmp_path: Path, order: str) -> None:
    data = batches(tmp_path, order)
    rows, places = data.rows(40, 24), data.places(40, 24)
    assert [(place.row, place.position) for place in places] == [(i, 40 + i) for i in range(24)]
    assert {place.source for place in places} == {"old", "new"}
    for row, place in zip(rows, places, strict=True):
        file = open_tokens(place.path)
        parts = [file.document(part.document)[part.offset : part.offset + part.tokens] for part in place.parts]
        assert all(part.tokens > 0 for part in place.parts)
        np.testing.assert_array_equal(np.concatenate(parts), row)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=12).filter(sum), data=st.data())
def test_every_token_has_its_document(tmp_path: Path, sizes: list[int], data: st.DataObject) -> None:
    with TokenFileWriter(tmp_path / "x", np.uint16, overwrite=True) as writer:
        for size in sizes:
            writer.add_document(np.zeros(size, np.uint16))
    file = open_tokens(tmp_path / "x")
    owners = [document for document, size in enumerate(sizes) for _ in range(size)]
    assert [file.document_at(token) for token in range(sum(sizes))] == owners
    start = data.draw(st.integers(0, sum(sizes) - 1))
    length = data.draw(st.integers(1, sum(sizes) - start))
    parts = runs_of(file, np.array([start]), np.array([length]))
    assert [part.document for part in parts for _ in range(part.tokens)] == owners[start : start + length]
    with pytest.raises(IndexError):
        file.document_at(sum(sizes))
