"""Numbers by document: what was written is read again, and numbers of other documents are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load_file, save_file

from megarewarm.data.files.document_table import FORMAT, DocumentTable, read_table, table_path, write_table
from megarewarm.data.files.token_file import TokenFile, TokenFileWriter, open_tokens
from megarewarm.errors import UserError


def tokens(prefix: Path, documents: int = 5, first: int = 0) -> TokenFile:
    with TokenFileWriter(prefix, np.uint16, overwrite=True) as writer:
        for document in range(documents):
            writer.add_document(np.arange(first + document, first + 2 * document))
    return open_tokens(prefix)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> TokenFile:
    return tokens(tmp_path_factory.mktemp("data") / "a")


@settings(max_examples=25, deadline=None)
@given(scores=arrays(np.float64, 5), about=st.dictionaries(st.text(), st.text(), max_size=3), listed=st.sets(st.integers(0, 4)))
def test_what_was_written_is_read_again(file, tmp_path_factory, scores, about, listed):
    folder = tmp_path_factory.mktemp("tables")
    written = write_table(folder / "a.loss", DocumentTable("scores", scores, about), file)
    assert written == folder / "a.loss.safetensors"
    table = read_table(folder / "a.loss", "scores", file)
    assert table.values.tobytes() == scores.tobytes() and table.about == about
    assert load_file(written)["values"].tobytes() == scores.tobytes()  # as anybody's safetensors reads it
    kept = np.array(sorted(listed), np.int64)
    write_table(folder / "kept", DocumentTable("list", kept), file)
    assert read_table(str(folder / "kept.safetensors"), "list", file).values.tolist() == sorted(listed)


def test_the_same_table_is_the_same_bytes(file, tmp_path):
    tables = [write_table(tmp_path / name, DocumentTable("scores", np.arange(5.0)), file) for name in ("x", "y")]
    assert tables[0].read_bytes() == tables[1].read_bytes()


def test_a_copy_of_the_token_file_will_do_and_another_file_will_not(file, tmp_path):
    write_table(tmp_path / "scores", DocumentTable("scores", np.arange(5.0)), file)
    assert read_table(tmp_path / "scores", "scores", tokens(tmp_path / "copy")).values[4] == 4
    for name, other in {"ids": tokens(tmp_path / "ids", first=1), "fewer": tokens(tmp_path / "fewer", 4)}.items():
        with pytest.raises(
            UserError, match=rf"scores\.safetensors was made of .*a\.bin, whose documents are not .*{name}\.bin"
        ):
            read_table(tmp_path / "scores", "scores", other)


def test_nothing_is_overwritten_unless_asked_for(file, tmp_path):
    place = write_table(tmp_path / "scores", DocumentTable("scores", np.arange(5.0)), file)
    with pytest.raises(UserError, match="exists"):
        write_table(tmp_path / "scores", DocumentTable("scores", np.zeros(5)), file)
    assert read_table(place, "scores", file).values[4] == 4
    write_table(tmp_path / "scores", DocumentTable("scores", np.zeros(5)), file, overwrite=True)
    assert read_table(place, "scores", file).values[4] == 0


@pytest.mark.parametrize(
    ("kind", "values"),
    [("scores", np.zeros(4)), ("scores", np.zeros((5, 1))), ("list", [1, 1]), ("list", [2, 1]), ("list", [-1]), ("list", [5])],
)
def test_values_that_do_not_fit_are_never_written(file, tmp_path, kind, values):
    with pytest.raises(ValueError, match="bad"):
        write_table(tmp_path / "bad", DocumentTable(kind, np.asarray(values)), file)
    assert not list(tmp_path.iterdir())


def test_foreign_files_are_refused_by_name(file, tmp_path):
    with pytest.raises(UserError, match=r"none\.safetensors does not exist: expected scores of documents of .*a\.bin"):
        read_table(tmp_path / "none", "scores", file)
    place = write_table(tmp_path / "scores", DocumentTable("scores", np.arange(5.0)), file)
    with pytest.raises(UserError, match="is scores of documents, expected a list of documents"):
        read_table(place, "list", file)
    whole = place.read_bytes()
    for broken in (b"", b"{}", whole[:-3], whole[:40], b"\xff" * 64):
        table_path(tmp_path / "broken").write_bytes(broken)
        with pytest.raises(UserError, match=r"broken\.safetensors is no readable safetensors file"):
            read_table(tmp_path / "broken", "scores", file)
    said = json.loads(json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"][FORMAT])
    nobody = {key: value for key, value in said.items() if key != "file"}
    for values, metadata, message in (
        ({"values": np.zeros(5)}, None, "holds no numbers by document"),
        ({"values": np.zeros(5)}, nobody, "holds no numbers by document"),
        ({"values": np.zeros(5)}, {**said, "file": 5}, "holds no numbers by document"),
        ({"values": np.zeros(5)}, {**said, "about": []}, "holds no numbers by document"),
        ({"weight": np.zeros(5)}, said, "is no readable safetensors file"),
        ({"values": np.zeros(5, np.float32)}, said, "values are float32"),
        ({"values": np.zeros(6)}, said, "6 scores for 5 documents"),
    ):
        save_file(values, tmp_path / "foreign.safetensors", metadata=metadata and {FORMAT: json.dumps(metadata)})
        with pytest.raises(UserError, match=message):
            read_table(tmp_path / "foreign", "scores", file)
