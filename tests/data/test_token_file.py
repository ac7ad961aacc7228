"""Token files against files that are built here byte by byte, and against GPT-NeoX's own."""

from __future__ import annotations

import logging
import os
import re
import struct
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.data.files import index_file, token_file
from megarewarm.data.files.index_file import HEADER
from megarewarm.data.files.token_file import TokenFileWriter, dtype_for, open_tokens
from megarewarm.errors import UserError

FORMATS = {1: "B", 4: "i", 5: "q", 8: "H"}
DOCUMENTS = [[1, 2, 3], [], [4], [5, 6, 7, 8, 9], []]


def write_pair(prefix: Path, documents: list[list[int]], code: int = 8, **change: object) -> Path:
    """A pair out of struct.pack alone; ``change`` replaces parts of it."""
    letter = FORMATS.get(code, "H")
    itemsize = struct.calcsize(f"<{letter}")
    pointers, position = [], 0
    for document in documents:
        pointers.append(position)
        position += len(document) * itemsize
    n = len(documents)
    parts: dict[str, Any] = {
        "magic": b"MMIDIDX\x00\x00",
        "version": 1,
        "code": code,
        "sizes": [len(document) for document in documents],
        "pointers": pointers,
        "ends": list(range(n + 1)),
        "modes": b"",
    } | change
    ends = parts["ends"]
    with open(f"{prefix}.idx", "wb") as file:
        file.write(parts["magic"] + struct.pack("<QBQQ", parts["version"], parts["code"], n, len(ends)))
        file.write(struct.pack(f"<{n}i", *parts["sizes"]))
        file.write(struct.pack(f"<{n}q", *parts["pointers"]))
        file.write(struct.pack(f"<{len(ends)}q", *ends))
        file.write(parts["modes"])
    with open(f"{prefix}.bin", "wb") as file:
        for document in documents:
            file.write(struct.pack(f"<{len(document)}{letter}", *document))
    return prefix


documents_of_ids = st.lists(st.lists(st.integers(0, 2**16 - 1), max_size=12), max_size=12)


@settings(max_examples=60, deadline=None)
@given(documents=documents_of_ids, code=st.sampled_from([4, 5, 8]))
def test_reader_gives_the_documents_that_struct_wrote(tmp_path_factory, documents, code):
    prefix = write_pair(tmp_path_factory.mktemp("pair") / "x", documents, code)
    file = open_tokens(prefix)
    flat = [token for document in documents for token in document]
    assert file.dtype == {4: np.int32, 5: np.int64, 8: np.uint16}[code]
    assert (file.num_documents, file.total_tokens) == (len(documents), len(flat))
    assert [file.document(i).tolist() for i in range(file.num_documents)] == documents
    assert file.sizes.tolist() == [len(document) for document in documents] and file.sizes.dtype == np.int64
    assert file.offsets.tolist() == [sum(map(len, documents[:i])) for i in range(len(documents) + 1)]
    assert [file.document_start(i) for i in range(len(documents) + 1)] == file.offsets.tolist()
    for start in range(len(flat)):
        assert file.read(start, len(flat) - start).tolist() == flat[start:]


@settings(max_examples=60, deadline=None)
@given(documents=documents_of_ids, wide=st.booleans())
def test_writer_gives_the_bytes_that_struct_writes(tmp_path_factory, documents, wide):
    folder = tmp_path_factory.mktemp("pair")
    expected = write_pair(folder / "expected", documents, 4 if wide else 8)
    with TokenFileWriter(folder / "made", np.int32 if wide else np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
    assert (writer.num_documents, writer.num_tokens) == (len(documents), sum(map(len, documents)))
    for suffix in (".bin", ".idx"):
        assert Path(f"{folder / 'made'}{suffix}").read_bytes() == Path(f"{expected}{suffix}").read_bytes()
    assert sorted(os.listdir(folder)) == ["expected.bin", "expected.idx", "made.bin", "made.idx"]


def test_writer_over_a_recorded_file_gives_gpt_neox_bytes(golden, tmp_path):
    file = open_tokens(golden / "A_text_document")
    with TokenFileWriter(tmp_path / "a", file.dtype) as writer:
        for i in range(file.num_documents):
            writer.add_document(file.document(i))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (golden / f"A_text_document.{suffix}").read_bytes()


def test_pointers_above_two_gibibytes_are_64_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(token_file, "ranges", lambda total, block: index_file.ranges(total, 3))
    writer = TokenFileWriter(tmp_path / "x", np.int32)
    with writer:
        writer.add_document([1])
        writer._sizes.extend([2**31 - 1] * 7)  # the .bin behind them is a hole
        writer._bin.file.truncate(4 * (1 + 7 * (2**31 - 1)))
    file = open_tokens(tmp_path / "x")
    assert [file.document_start(i) for i in range(9)] == [0] + [1 + i * (2**31 - 1) for i in range(8)]
    assert file.total_tokens == 1 + 7 * (2**31 - 1)
    assert file.read(file.total_tokens - 2, 2).tolist() == [0, 0]


def test_both_suffixes_and_the_prefix_name_the_same_file(tmp_path):
    prefix = write_pair(tmp_path / "x", DOCUMENTS)
    prints = {open_tokens(f"{prefix}{suffix}").fingerprint() for suffix in ("", ".bin", ".idx")}
    assert len(prints) == 1


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32"])
def test_bare_file(tmp_path, dtype):
    path = tmp_path / "x.bin"
    path.write_bytes(np.arange(7, dtype=dtype).tobytes())
    file = open_tokens(path, dtype=dtype)
    assert (file.total_tokens, file.num_documents, file.index_path) == (7, 1, None)
    assert file.document(0).tolist() == list(range(7)) and file.document_start(1) == 7
    assert file.sizes.tolist() == [7] and file.offsets.tolist() == [0, 7]


def test_bare_file_takes_its_dtype_from_the_vocabulary(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(8))
    assert open_tokens(path, vocab_size=65536).dtype == np.uint16
    assert open_tokens(path, vocab_size=65537).dtype == np.uint32
    with pytest.raises(UserError, match="give 'dtype'"):
        open_tokens(path)
    with pytest.raises(UserError, match="'float32' is not one of"):
        open_tokens(path, dtype="float32")
    with pytest.raises(UserError, match=r"write '.*x\.bin'"):
        open_tokens(tmp_path / "x", vocab_size=100)
    path.write_bytes(bytes(7))
    with pytest.raises(UserError, match="7 bytes, not a multiple of 2"):
        open_tokens(path, dtype="uint16")


def test_merged_file_without_document_index_is_repaired_with_a_warning(tmp_path, caplog):
    prefix = write_pair(tmp_path / "x", DOCUMENTS, ends=[0])
    with caplog.at_level(logging.WARNING):
        file = open_tokens(prefix)
    assert "x.idx has no document index" in caplog.text
    assert [file.document(i).tolist() for i in range(file.num_documents)] == DOCUMENTS


def test_sequences_grouped_into_documents_are_each_a_document(tmp_path, caplog):
    file = open_tokens(write_pair(tmp_path / "x", DOCUMENTS, ends=[0, 2, 5]))
    assert file.num_documents == 5 and not caplog.records


def test_modes_are_inferred_from_the_size(tmp_path):
    assert open_tokens(write_pair(tmp_path / "x", DOCUMENTS, modes=bytes(5))).total_tokens == 9
    with pytest.raises(UserError, match="sequence 3 is of mode 1"):
        open_tokens(write_pair(tmp_path / "y", DOCUMENTS, modes=b"\0\0\0\1\0"))


def test_old_index_has_its_own_message(tmp_path):
    write_pair(tmp_path / "x", DOCUMENTS)
    (tmp_path / "x.idx").write_bytes(b"TNTIDX\x00\x00" + bytes(200))
    with pytest.raises(UserError, match=r"TNTIDX.*again"):
        open_tokens(tmp_path / "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"magic": b"NOTANIDX\x00"}, "not a token index: it starts with b'NOTANIDX"),
        ({"version": 2}, "version 2, only version 1"),
        ({"code": 6}, r"floating-point numbers \(dtype code 6\)"),
        ({"code": 7}, r"floating-point numbers \(dtype code 7\)"),
        ({"code": 9}, "dtype code 9"),
        ({"ends": [0, 1, 2]}, r"covers 0..2, expected 0..5"),
        ({"ends": [1, 2, 3, 4, 5]}, r"covers 1..5, expected 0..5"),
        ({"ends": []}, "covers nothing"),
        ({"modes": b"\0\0"}, r"\.idx has 144 bytes, expected 142 \(or 147 with modes\).*too long"),
        ({"pointers": [0, 6, 6, 10, 18]}, "sequence 3 starts at byte 10, expected 8"),
        ({"pointers": [2, 6, 6, 8, 18]}, "first sequence starts at byte 2"),
        ({"sizes": [3, -1, 1, 5, 0]}, "sequence 1 has -1 tokens"),
    ],
)
def test_damaged_index_is_refused_with_its_place(tmp_path, change, message):
    prefix = write_pair(tmp_path / "x", DOCUMENTS, **change)
    with pytest.raises(UserError, match=message):
        open_tokens(prefix)


@pytest.mark.parametrize("kept", [0, 8, 20, 33, 34, 60, 141])
def test_truncated_index_is_refused(tmp_path, kept):
    prefix = write_pair(tmp_path / "x", DOCUMENTS)
    path = tmp_path / "x.idx"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=f"has {kept} bytes, expected 142.*truncated" if kept >= 34 else "header of 34"):
        open_tokens(prefix)


@pytest.mark.parametrize(("size", "word"), [(0, "truncated"), (17, "truncated"), (19, "too long"), (20, "too long")])
def test_bin_of_another_size_is_refused(tmp_path, size, word):
    prefix = write_pair(tmp_path / "x", DOCUMENTS)
    (tmp_path / "x.bin").write_bytes(bytes(size))
    with pytest.raises(UserError, match=f"x.bin has {size} bytes, its index ends at 18: it is {word}"):
        open_tokens(prefix)


@pytest.mark.parametrize("block", [7, index_file.CHECK_WHOLE])
def test_damage_anywhere_in_a_long_index_is_found(tmp_path, monkeypatch, block):
    """Any size or pointer, wherever it lies between the blocks in which they are looked at, with its place in the file."""
    monkeypatch.setattr(index_file, "CHECK_WHOLE", block)
    count = 3 * 2**18 + 5 if block > 7 else 100
    prefix = write_pair(tmp_path / "x", [[1]] * count)
    index, random = tmp_path / "x.idx", np.random.default_rng(0)
    assert open_tokens(prefix).num_documents == count
    whole = index.read_bytes()
    edges = [0, 1, block - 1, block, count - 2, count - 1]
    for document in [*edges, *random.integers(0, count, 10).tolist()]:
        for where, kind in ((HEADER.size + 4 * document, "<i"), (HEADER.size + 4 * count + 8 * document, "<q")):
            (right,) = struct.unpack_from(kind, whole, where)
            for wrong in (right + 1, right - 1, -5, right + 2**30):
                damaged = bytearray(whole)
                struct.pack_into(kind, damaged, where, wrong)
                index.write_bytes(damaged)
                # a wrong size is known by where the next document begins, and at the end by the length of the .bin
                with pytest.raises(UserError, match=r"sequence (starts|\d+ (starts at byte|has -))|its index ends at") as told:
                    open_tokens(prefix)
                found = re.search(r"sequence (\d+)", str(told.value))
                if kind == "<q" and "its index" not in str(told.value) and found:
                    assert int(found[1]) == document and f"its byte {where})" in str(told.value)


def test_documents_in_another_order_are_refused(tmp_path):
    count = 1000
    pointers = [2 * i for i in range(count)]
    pointers[1:-1] = pointers[-2:0:-1]  # all but the ends: a subset or shuffle of documents over one .bin
    with pytest.raises(UserError, match="only files without gaps"):
        open_tokens(write_pair(tmp_path / "x", [[1]] * count, pointers=pointers))


def test_missing_files_and_contradicting_dtype(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.bin does not exist"):
        open_tokens(tmp_path / "nothing")
    prefix = write_pair(tmp_path / "x", DOCUMENTS)
    assert open_tokens(prefix, dtype="uint16").total_tokens == 9
    with pytest.raises(UserError, match="says the ids are uint16, not int32"):
        open_tokens(prefix, dtype="int32")


def test_reading_outside_is_an_error_not_a_wrap(tmp_path):
    file = open_tokens(write_pair(tmp_path / "x", DOCUMENTS))
    for start, length in ((-1, 1), (0, 10), (9, 1), (0, -1)):
        with pytest.raises(IndexError):
            file.read(start, length)
    for document in (-1, 5):
        with pytest.raises(IndexError):
            file.document(document)
    view = file.view(2, 4)
    assert view.read(0, 6).tolist() == [4, 5, 6, 7, 8, 9] and view.sizes().tolist() == [1, 5]
    for start, length in ((-1, 1), (0, 7)):
        with pytest.raises(IndexError):
            view.read(start, length)
    with pytest.raises(IndexError):
        file.view(3, 6)
    assert file.document(cast(int, np.int64(3))).tolist() == [5, 6, 7, 8, 9]  # numpy integers are integers


def test_file_that_shrinks_while_open_is_an_error(tmp_path):
    file = open_tokens(write_pair(tmp_path / "x", DOCUMENTS))
    os.truncate(tmp_path / "x.bin", 10)
    with pytest.raises(UserError, match="has become shorter"):
        file.read(3, 4)


def test_fingerprint_follows_the_contents_alone(tmp_path):
    first = open_tokens(write_pair(tmp_path / "x", DOCUMENTS)).fingerprint()
    os.utime(tmp_path / "x.bin", (1, 1))
    (tmp_path / "other").mkdir()
    assert open_tokens(write_pair(tmp_path / "other" / "y", DOCUMENTS)).fingerprint() == first
    assert open_tokens(tmp_path / "x").fingerprint() == first
    others = {
        "an id": ([[1, 2, 3], [], [4], [5, 6, 7, 8, 0], []], 8),
        "a boundary": ([[1, 2], [3], [4], [5, 6, 7, 8, 9], []], 8),
        "an empty document": (DOCUMENTS[:-1], 8),
        "the dtype": (DOCUMENTS, 4),
    }
    prints = {open_tokens(write_pair(tmp_path / "z", *other)).fingerprint() for other in others.values()}
    assert len(prints | {first}) == len(others) + 1


def test_fingerprint_of_a_large_file_reads_blocks_with_both_ends(tmp_path):
    ids = np.zeros(8 * 2**20, np.uint16)
    path = tmp_path / "x.bin"
    prints = []
    for place in (None, 0, len(ids) - 1):
        ids[:] = 0
        if place is not None:
            ids[place] = 1
        path.write_bytes(ids.tobytes())
        prints.append(open_tokens(path, dtype="uint16").fingerprint())
    assert len(set(prints)) == 3


def test_ids_outside_of_the_vocabulary_are_named(tmp_path):
    file = open_tokens(write_pair(tmp_path / "x", [[1, 2], [3, 511, 4]]))
    file.check_vocabulary(512)
    with pytest.raises(UserError, match=r"x\.bin: token 3 is id 511, outside of the model's vocabulary of 511 ids"):
        file.check_vocabulary(511)
    with pytest.raises(UserError, match="token 1 is id -7"):
        open_tokens(write_pair(tmp_path / "y", [[1, -7]], 4)).check_vocabulary(512)


def test_ids_of_files_above_the_limit_are_sampled(tmp_path, monkeypatch):
    ids = np.zeros(2**26, np.uint16)  # 128 MiB
    ids[-1] = 600
    ids[2**19] = 700  # in no block
    (tmp_path / "x.bin").write_bytes(ids.tobytes())
    file = open_tokens(tmp_path / "x.bin", dtype="uint16")
    with pytest.raises(UserError, match=f"token {2**19} is id 700"):
        file.check_vocabulary(512)
    monkeypatch.setattr(token_file, "SCAN_WHOLE", 2**20)
    with pytest.raises(UserError, match=f"token {2**26 - 1} is id 600"):
        file.check_vocabulary(512)


def test_writer_leaves_nothing_after_an_exception(tmp_path):
    message = "document 1 has id 65536, uint16 goes from 0 to 65535"
    with pytest.raises(UserError, match=message), TokenFileWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1])
        writer.add_document([2, 65536])
    assert os.listdir(tmp_path) == []
    with pytest.raises(UserError, match="has id -1"), TokenFileWriter(tmp_path / "x", np.int32) as writer:
        writer.add_document([-1])
    assert os.listdir(tmp_path) == []


def test_writer_overwrites_only_when_asked_and_only_at_the_end(tmp_path):
    prefix = write_pair(tmp_path / "x", DOCUMENTS)
    with pytest.raises(UserError, match=r"x\.bin exists"), TokenFileWriter(prefix, np.uint16):
        pass
    with pytest.raises(KeyError), TokenFileWriter(prefix, np.uint16, overwrite=True) as writer:
        writer.add_document([9, 9])
        raise KeyError
    assert open_tokens(prefix).total_tokens == 9 and len(os.listdir(tmp_path)) == 2
    with TokenFileWriter(prefix, np.uint16, overwrite=True) as writer:
        writer.add_document([9, 9])
        assert open_tokens(prefix).total_tokens == 9
    assert open_tokens(prefix).read(0, 2).tolist() == [9, 9]


def test_writer_takes_only_flat_integers_and_known_types(tmp_path):
    with pytest.raises(ValueError, match="uint16 or int32"):
        TokenFileWriter(tmp_path / "x", np.uint32)
    for bad in ([1.5], [[1, 2]], ["a"]):
        with pytest.raises(ValueError, match="flat array"), TokenFileWriter(tmp_path / "x", np.uint16) as writer:
            writer.add_document(bad)
    assert dtype_for(65536) == np.uint16 and dtype_for(65537) == np.int32


@pytest.mark.parametrize("kept", [0, 2**22])
def test_starts_of_documents_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    monkeypatch.setattr(token_file, "KEEP_STARTS", kept)
    sizes = [3, 0, 7, 1, 0, 5]
    with TokenFileWriter(tmp_path / "x", np.uint16) as writer:
        for size in sizes:
            writer.add_document(np.zeros(size, np.uint16))
    file = open_tokens(tmp_path / "x")
    for order in ([5, 0, 3, 3], [1, 4], []):
        assert file.starts_of(np.array(order, np.int64)).tolist() == [sum(sizes[:i]) for i in order]
    with pytest.raises(IndexError):
        file.starts_of(np.array([6]))
