"""Token files merged and looked into."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.data.files import merge
from megarewarm.data.files.inspection import first_difference, lengths, verify
from megarewarm.data.files.merge import merge_token_files
from megarewarm.data.files.token_file import TokenFileWriter, open_tokens
from megarewarm.errors import UserError
from tests.checkpoint.test_convert import tool


def write(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> str:
    with TokenFileWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document, np.int64))
    return str(prefix)


DOCUMENTS = st.lists(st.lists(st.integers(0, 60_000), max_size=9), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(files=st.lists(st.tuples(DOCUMENTS, st.booleans()), min_size=1, max_size=4), block=st.sampled_from([1, 7, 2**22]))
def test_merged_files_are_those_written_at_once(tmp_path_factory, files, block) -> None:
    place = tmp_path_factory.mktemp("merged")
    names = [write(place / str(i), docs, np.int32 if wide else np.uint16) for i, (docs, wide) in enumerate(files)]
    before, merge._BLOCK = merge._BLOCK, block
    try:
        counts = merge_token_files(names, place / "merged")
    finally:
        merge._BLOCK = before
    everything = [document for docs, _ in files for document in docs]
    write(place / "once", everything, np.int32 if any(wide for _, wide in files) else np.uint16)
    assert counts == (len(everything), sum(map(len, everything)))
    for suffix in ("bin", "idx"):
        assert (place / f"merged.{suffix}").read_bytes() == (place / f"once.{suffix}").read_bytes()
    assert first_difference(str(place / "merged"), str(place / "once")) is None


def test_a_merge_that_cannot_be_leaves_everything_as_it_was(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", [[1, 2]]), write(tmp_path / "two", [[3]])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "is one of the files to be merged" in tool("merge_data", one, two, "--output", one, "--overwrite", expect=2)
    assert "exists" in tool("merge_data", one, "--output", two, expect=2)
    assert "nowhere" in tool("merge_data", one, tmp_path / "nowhere", "--output", tmp_path / "out", expect=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert "2 documents, 3 tokens" in tool("merge_data", one, two, "--output", tmp_path / "out")


def test_lengths_are_counted_in_doubling_bins(tmp_path: Path) -> None:
    found = lengths(open_tokens(write(tmp_path / "a", [[], [1], [1, 2], [1, 2, 3], [1] * 9, []])))
    assert found.bins == [(1, 1, 1), (2, 3, 2), (4, 7, 0), (8, 15, 1)]
    assert (found.empty, found.median, found.longest) == (2, 2.5, 9)


def test_differences_are_named(tmp_path: Path) -> None:
    a = write(tmp_path / "a", [[1, 2], [3, 4, 5]])
    assert first_difference(a, write(tmp_path / "b", [[1, 2], [3, 4, 5]], np.int32)) is None
    assert "2 documents" in str(first_difference(a, write(tmp_path / "c", [[1, 2]])))
    assert "document 1 has 3 tokens" in str(first_difference(a, write(tmp_path / "d", [[1, 2], [3, 4]])))
    assert "token 3 is 4 in" in str(first_difference(a, write(tmp_path / "e", [[1, 2], [3, 9, 5]])))


def test_verification_finds_what_opening_does_not_look_for(tmp_path: Path) -> None:
    file = open_tokens(write(tmp_path / "a", [[1, 2], [3, 400]]))
    checks = verify(file, 401)
    assert len(checks) == 5 and "a.json: is not there" in checks[-1] and "not compared" in checks[-1]
    with pytest.raises(UserError, match="token 3 is 400, the vocabulary has 400 ids"):
        verify(file, 400)


def test_the_screen_shows_header_lengths_documents_and_checks(golden: Path, tmp_path: Path) -> None:
    prefix, tokenizer = golden / "A_text_document", golden / "tiny_tokenizer.json"
    file = open_tokens(prefix)
    shown = tool("inspect_data", prefix, "--verify", "--compare", prefix, "--tokenizer", tokenizer)
    assert f"{file.num_documents:,} documents, {file.total_tokens:,} tokens" in shown
    assert "follow one another without gaps" in shown and "the same documents with the same ids" in shown and "█" in shown
    text = tool("inspect_data", prefix, "--document", 0, "--tokenizer", tokenizer)
    first = json.loads((golden / "A.jsonl").read_text().splitlines()[0])["text"]
    assert first[:60].split()[0] in text
    assert "the file has" in tool("inspect_data", prefix, "--document", 10**9, expect=2)
    for suffix in ("bin", "idx"):
        (tmp_path / f"cut.{suffix}").write_bytes(Path(f"{prefix}.{suffix}").read_bytes())
    os.truncate(tmp_path / "cut.bin", 100)
    assert "truncated" in tool("inspect_data", tmp_path / "cut", expect=2)


def made(folder: Path, name: str, documents: list[list[int]], dtype: type = np.uint16, fingerprint: str | None = None) -> Path:
    """A pair and, with ``fingerprint``, the manifest of a preprocessing."""
    with TokenFileWriter(folder / name, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    if fingerprint is not None:
        sums = {suffix: hashlib.sha256((folder / f"{name}.{suffix}").read_bytes()).hexdigest() for suffix in ("bin", "idx")}
        said = {"documents": len(documents), "tokens": sum(map(len, documents)), "sha256": sums}
        (folder / f"{name}.json").write_text(json.dumps(said | {"tokenizer": {"file": "t.json", "fingerprint": fingerprint}}))
    return folder / name


def test_verify_looks_at_the_document_index_the_manifest_and_every_id(tmp_path: Path) -> None:
    good = made(tmp_path, "good", [[1, 2], [3], [4, 5]], fingerprint="f")
    said = verify(open_tokens(good), None)
    assert any("document index goes from 0 to 3" in line for line in said) and "checksums" in said[-1]
    index = bytearray((tmp_path / "good.idx").read_bytes())
    for entry in (9999, -1):
        index[-24:-16] = struct.pack("<q", entry)
        (tmp_path / "good.idx").write_bytes(index)
        with pytest.raises(UserError, match=rf"entry 1 of its document index is {entry}, expected 0 to 3"):
            verify(open_tokens(good), None)
    made(tmp_path, "bits", [[1, 2], [3]], fingerprint="f")
    data = bytearray((tmp_path / "bits.bin").read_bytes())
    data[0] ^= 1
    (tmp_path / "bits.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"bits\.bin: its SHA-256 is not the one in bits\.json"):
        verify(open_tokens(tmp_path / "bits"), None)
    negative = made(tmp_path, "negative", [[1, 2]], np.int32)
    np.array([1, -5], np.int32).tofile(tmp_path / "negative.bin")
    with pytest.raises(UserError, match="token 1 is -5, ids are counted from 0"):
        verify(open_tokens(negative), None)
    assert not any("largest" in line for line in verify(open_tokens(made(tmp_path, "empty", [[]])), None))


def test_merging_keeps_a_manifest_and_refuses_other_tokenizers(tmp_path: Path) -> None:
    a, b = made(tmp_path, "a", [[1]], fingerprint="f"), made(tmp_path, "b", [[2, 3]], fingerprint="f")
    made(tmp_path, "all", [[9]], fingerprint="stale")
    merge_token_files([a, b], tmp_path / "all", overwrite=True)
    said = json.loads((tmp_path / "all.json").read_text())
    assert (said["documents"], said["tokens"], said["tokenizer"]["fingerprint"]) == (2, 3, "f")
    assert "checksums" in verify(open_tokens(tmp_path / "all"), None)[-1]
    other = made(tmp_path, "other", [[4]], fingerprint="g")
    first = r"a\.bin was made with the tokenizer t\.json, which gives other"
    with pytest.raises(UserError, match=r"other\.bin was made with the tokenizer t\.json, .*" + first):
        merge_token_files([a, other], tmp_path / "mixed")
    wrong = made(tmp_path, "wrong", [[1], [2, 3]], np.int32)
    np.array([1, 2, -7], np.int32).tofile(tmp_path / "wrong.bin")
    with pytest.raises(UserError, match=r"wrong\.bin: token 2, in document 1, is -7"):
        merge_token_files([a, wrong], tmp_path / "mixed")
    with pytest.raises(UserError, match="expected a prefix"):
        merge_token_files([a], "")
    assert not list(tmp_path.glob("mixed*"))
