"""A source of some of its file's documents is, sample by sample, a source of a file that holds only these."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.config.data import DataConfig, ValidationSet
from megarewarm.data.files.document_table import DocumentTable, write_table
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.files.token_file import TokenFile, TokenFileWriter, open_tokens
from megarewarm.data.mixture.batches import TrainingBatches, build_training_batches
from megarewarm.data.mixture.moving import MovingWindows
from megarewarm.data.mixture.phases import Phase
from megarewarm.data.mixture.validation import ValidationWindows
from megarewarm.errors import UserError

S = 8
ORDERS = ["permuted", "neox", "megatron", "sequential"]


def write(prefix: Path, documents: list[np.ndarray]) -> str:
    with TokenFileWriter(prefix, np.uint16, overwrite=True) as writer:
        for ids in documents:
            writer.add_document(ids)
    return str(prefix)


def texts(sizes: list[int], first: int = 0) -> list[np.ndarray]:
    """Documents of these sizes whose tokens count up through all of them."""
    ends = first + np.cumsum([0, *sizes])
    return [np.arange(a, b, dtype=np.uint16) for a, b in itertools.pairwise(ends.tolist())]


def keep(path: str, numbers: list[int], name: str = "kept") -> str:
    file = open_tokens(path)
    return str(write_table(f"{path}.{name}", DocumentTable("list", np.array(numbers, np.int64)), file, overwrite=True))


def build(sources: list[dict[str, Any]], total: int, **data: Any) -> TrainingBatches:
    config = DataConfig.model_validate({"sequence_length": S, "train": sources, **data})
    return build_training_batches(TokenFiles(config, 2**16), [Phase(0, config.train)], total_samples=total)


def refusal(sources: list[dict[str, Any]], **data: Any) -> str:
    with pytest.raises(UserError) as caught:
        build(sources, 1, **data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


FILES = st.lists(st.integers(0, 40), min_size=1, max_size=60).flatmap(
    lambda sizes: st.tuples(st.just(sizes), st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
)


@settings(max_examples=60, deadline=None)
@given(given=FILES, order=st.sampled_from(ORDERS), epochs=st.sampled_from([1, 1.5, 3]))
def test_a_list_is_a_file_of_only_its_documents(tmp_path_factory, given, order, epochs):
    sizes, flags = given
    folder = tmp_path_factory.mktemp("listed")
    documents = texts(sizes)
    kept = [i for i, flag in enumerate(flags) if flag]
    whole, part = write(folder / "whole", documents), write(folder / "part", [documents[i] for i in kept])
    tokens = sum(sizes[i] for i in kept)
    total = int(epochs * ((tokens - 1) // S))
    if total < 1:
        assert f"gives {tokens} tokens" in refusal([{"path": whole, "documents": keep(whole, kept)}])
        return
    settings = {"order": order, "seed": 5}
    listed = build([{"path": whole, "documents": keep(whole, kept), "max_epochs": epochs}], total, **settings)
    alone = build([{"path": part, "max_epochs": epochs}], total, **settings)
    assert np.array_equal(listed.rows(0, total), alone.rows(0, total))
    for first in range(0, total, 7):
        count = min(5, total - first)
        assert np.array_equal(listed.rows(first, count), alone.rows(first, count))


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("data") / "text", texts([11, 0, 30, 70_000 % 997, 25, 1, 90, 44] * 6))


def test_places_name_the_documents_of_the_file(path):
    kept = [0, 3, 4, 9, 20, 41]
    places = build([{"path": path, "documents": keep(path, kept)}], 20).places(0, 20)
    file = open_tokens(path)
    rows = build([{"path": path, "documents": keep(path, kept)}], 20).rows(0, 20)
    for place, row in zip(places, rows, strict=True):
        assert {part.document for part in place.parts} <= set(kept)
        read = [file.document(part.document)[part.offset : part.offset + part.tokens] for part in place.parts]
        assert np.array_equal(np.concatenate(read), row)


def test_long_documents_are_found(tmp_path):
    documents = texts([5, 40_000, 3]) + texts([30, 70_000 - 5000, 9])
    whole, part = write(tmp_path / "whole", documents), write(tmp_path / "part", [documents[i] for i in (0, 4, 5)])
    listed, alone = build([{"path": whole, "documents": keep(whole, [0, 4, 5])}], 99), build([{"path": part}], 99)
    assert np.array_equal(listed.rows(0, 99), alone.rows(0, 99))


def test_two_lists_of_a_file_are_two_sources_and_the_fingerprint_knows_them(path):
    even, odd = keep(path, [0, 2, 4, 6], "even"), keep(path, [1, 3, 5, 7], "odd")
    both = build([{"path": path, "documents": even, "name": "e"}, {"path": path, "documents": odd, "name": "o"}], 20)
    file, rows = open_tokens(path), both.rows(0, 20)
    of = [[{file.document_at(int(token)) % 2 for token in row} for row in rows[i::2]] for i in range(2)]
    assert all(each == {0} for each in of[0]) and all(each == {1} for each in of[1])
    one, other, again = (build([{"path": path, "documents": d}], 9).fingerprint() for d in (even, odd, even))
    assert one == again != other
    moved = keep(path, [0, 2, 4, 6], "elsewhere")
    assert build([{"path": path, "documents": moved}], 9).fingerprint() == one != build([{"path": path}], 9).fingerprint()


@pytest.mark.parametrize("kind", [ValidationWindows, lambda config, files: MovingWindows(config, files, 2)])
def test_validation_sets_read_lists_too(tmp_path, kind):
    documents = texts([60, 13, 50, 77, 41, 90])
    whole, part = write(tmp_path / "whole", documents), write(tmp_path / "part", [documents[i] for i in (1, 3, 5)])
    rows = []
    for source in ({"path": whole, "documents": keep(whole, [1, 3, 5])}, {"path": part}):
        config = DataConfig.model_validate({"sequence_length": S, "train": [{"path": whole}]})
        held = ValidationSet.model_validate({"name": "v", "tokens": 80, "sources": [source]})
        rows.append(list(kind(held, TokenFiles(config, 2**16)).slice(0).micro_batches(0, 1, 3)))
    assert all(np.array_equal(one, other) for one, other in zip(*rows, strict=True)) and len(rows[0]) == 4


def test_few_bytes_a_document(tmp_path):
    view = TokenFiles(DataConfig.model_validate({"sequence_length": S, "train": [{"path": "x"}]}), 2**16)
    sizes = np.full(40_000, 3)
    with TokenFileWriter(tmp_path / "many", np.uint16) as writer:
        writer.add_documents(np.arange(sizes.sum()) % 999, sizes)
    kept = keep(str(tmp_path / "many"), list(range(0, 40_000, 2)))
    source = DataConfig.model_validate(
        {"sequence_length": S, "train": [{"path": str(tmp_path / "many"), "documents": kept}]}
    ).train[0]
    row = view.view(source).row  # type: ignore[attr-defined]
    held = sum(array.nbytes for array in (row.order, row._sizes, row._starts, row._long_rows, row._long_sizes))
    assert held / 20_000 < 6.3


def other(path: str, prefix: Path) -> TokenFile:
    file = open_tokens(path)
    return open_tokens(write(prefix, [file.document(i) + 1 for i in range(file.num_documents)]))


def test_what_is_no_list_of_this_file_is_refused(path, tmp_path):
    assert "does not exist: expected a list of documents of" in refusal([{"path": path, "documents": str(tmp_path / "none")}])
    foreign = write_table(tmp_path / "foreign", DocumentTable("list", np.array([0, 2])), other(path, tmp_path / "other"))
    assert "whose documents are not those of" in refusal([{"path": path, "documents": str(foreign)}])
    scores = write_table(tmp_path / "scores", DocumentTable("scores", np.zeros(48)), open_tokens(path))
    assert "is scores of documents, expected a list" in refusal([{"path": path, "documents": str(scores)}])
    for order in ORDERS:
        assert "gives 0 tokens (0 documents)" in refusal([{"path": path, "documents": keep(path, [])}], order=order)
    text = refusal([{"path": path, "documents": keep(path, [5])}])
    assert "gives 1 tokens (1 documents), one sample takes 9: shorten data.sequence_length, change 'documents' or" in text


def test_keys_that_exclude_each_other(path):
    for keys, words in (
        ({"split": "9,1,0"}, "'documents' and 'split' both say which documents are read"),
        ({"layout": "rows"}, "layout 'rows' knows no documents"),
    ):
        with pytest.raises(ValueError, match=words):
            DataConfig.model_validate({"sequence_length": S, "train": [{"path": path, "documents": "d", **keys}]})
