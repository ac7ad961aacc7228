"""Text to token files: what is read, what is left out and counted, and what a failure leaves behind."""

from __future__ import annotations

import ast
import gzip
import inspect
import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megarewarm.data.preprocess import Documents, first_bytes, prepare, split_source, strip_doctests
from megarewarm.data.token_file import open_tokens
from megarewarm.data.tokenizers import Tokenizer, train_bpe
from megarewarm.errors import UserError

TEXTS = ["héllo wörld", "a\u2028b\nsecond line\n", "   ", "x" * 5000, "日本語 text"]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    words = " ".join(f"word{i} the quick brown fox" for i in range(300))
    return train_bpe([words], 300, tmp_path_factory.mktemp("bpe") / "tokenizer.json")


def compress_nothing(data: bytes) -> bytes:
    return data


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("", compress_nothing), (".gz", gzip.compress), (".zst", zstandard.compress)],
    ids=["plain", "gz", "zst"],
)
def test_jsonl_is_read_alike_however_it_is_packed(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    lines = b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in TEXTS)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(lines[:40]) + pack(lines[40:]))  # members or frames may follow each other
    documents = Documents([path])
    assert list(documents) == TEXTS == list(documents), "a second reading begins anew"
    assert documents.bytes_read == documents.total_bytes == path.stat().st_size


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.compress)], ids=["gz", "zst"])
def test_a_compressed_file_that_is_cut_off_is_refused(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"a.txt{suffix}"
    data = pack(np.random.default_rng(0).bytes(50_000).hex().encode())
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"not .*whole"):
        list(Documents([path]))


def test_a_txt_is_divided_by_end_of_text_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n<|endoftext|>\nthree\n<|endoftext|>\n")
    assert list(Documents([tmp_path / "a.txt"])) == ["one\ntwo\n", "three\n"]


def test_broken_records_are_counted_and_described(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = b'{"text": "good"}\n'
    broken = [
        b"{no json\n",
        b'{"other": 1}\n',
        b'{"text": 5}\n',
        b'["text"]\n',
        b'{"text": "\xff"}\n',
        b'{"text": "\\ud800"}\n',
    ]
    path.write_bytes(good + b"".join(broken) + b'\n{"text": ""}\n' + good)
    documents = Documents([path])
    assert list(documents) == ["good", "good"]
    assert (documents.broken, documents.empty) == (6, 2)
    assert documents.examples[0].startswith(f"{path}:2: not valid JSON")
    assert "known: other" in documents.examples[1] and len(documents.examples) == 5


def test_a_file_without_any_valid_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 3)
    with pytest.raises(UserError, match=r"no document is valid.*a\.jsonl:1: no key 'text'"):
        list(Documents([tmp_path / "a.jsonl"]))
    with pytest.raises(UserError, match="does not exist"):
        Documents([tmp_path / "missing.txt"])
    with pytest.raises(UserError, match="no known kind"):
        Documents([tmp_path / "a.csv"])


def test_token_files_hold_what_the_tokenizers_library_says(tmp_path: Path, bpe: Tokenizer) -> None:
    counts = prepare(TEXTS, bpe, tmp_path / "out")
    independent = tokenizers.Tokenizer.from_file(str(bpe.path))
    expected = [[*independent.encode(text).ids, independent.token_to_id("<|endoftext|>")] for text in TEXTS]
    written = open_tokens(tmp_path / "out", vocab_size=bpe.vocab_size)
    raw = np.fromfile(tmp_path / "out.bin", np.uint16)
    assert raw.tolist() == [token for document in expected for token in document]
    assert len(written.sizes) == len(TEXTS) == counts.documents and counts.tokens == raw.size
    manifest = json.loads((tmp_path / "out.json").read_text())
    assert manifest["tokens"] == raw.size and manifest["dtype"] == "uint16"
    assert counts.bytes == sum(len(text.encode()) for text in TEXTS)


def test_existing_files_stay_unless_overwriting_is_asked_for(tmp_path: Path, bpe: Tokenizer) -> None:
    prepare(["first"], bpe, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="exists"):
        prepare(["second"], bpe, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    prepare(["second", "third"], bpe, tmp_path / "out", overwrite=True)
    assert len(open_tokens(tmp_path / "out", vocab_size=bpe.vocab_size).sizes) == 2


def test_a_failure_in_the_middle_leaves_nothing_that_looks_complete(tmp_path: Path, bpe: Tokenizer) -> None:
    def documents():  # type: ignore[no-untyped-def]
        yield "x" * 2**21
        yield "y" * 2**21
        raise RuntimeError("disk pulled out")

    with pytest.raises(RuntimeError, match="pulled"):
        prepare(documents(), bpe, tmp_path / "out")
    assert not [path.name for path in tmp_path.iterdir() if path.suffix in (".bin", ".idx", ".json")]
    with pytest.raises(UserError, match="no document"):
        prepare(["", ""], bpe, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_first_bytes_stops_at_the_document_that_reaches_the_limit() -> None:
    assert list(first_bytes(["aé", "bb", "c"], 4)) == ["aé", "bb"]
    assert list(first_bytes(["aé", "bb"], 100)) == ["aé", "bb"]


SOURCE = '''"""Module."""
import os

class A:
    """Class é."""

    def f(self): "one line"; return 1

    async def g(self):
        """Only this."""

def h():
    "first"
    "second string is no docstring of what is left"
    return """kept"""
'''


def test_split_source_takes_out_every_docstring_and_nothing_else() -> None:
    prose, code = split_source(SOURCE)
    assert prose == ["Module.", "Class é.", "one line", "Only this.", "first"]
    names = [node.name for node in ast.walk(ast.parse(code)) if hasattr(node, "name")]
    assert sorted(names) == ["A", "f", "g", "h", "os"]
    assert 'return """kept"""' in code and "import os" in code
    assert split_source(code)[0] == []


@pytest.mark.parametrize("module", [ast, inspect, textwrap, json, gzip], ids=lambda module: module.__name__)
def test_split_source_keeps_the_program(module: object) -> None:
    """Independent of how the text is cut: the syntax trees are equal but for the docstrings."""
    source = inspect.getsource(module)  # type: ignore[arg-type]
    prose, code = split_source(source)
    assert prose and ast.dump(_without_docstrings(source)) == ast.dump(_without_docstrings(code))


def _without_docstrings(source: str) -> ast.Module:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            while node.body and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant):
                if not isinstance(node.body[0].value.value, str):
                    break
                del node.body[0]
            if not node.body and not isinstance(node, ast.Module):
                node.body = [ast.Pass()]
    return tree


def test_strip_doctests_leaves_the_prose() -> None:
    text = "Adds.\n\n    >>> add(1, 2)\n    3\n\n    >>> add(2, 2)\n    4\n\nSee also >>> nowhere."
    assert strip_doctests(text) == "Adds.\n\nSee also >>> nowhere."


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=8))
def test_jsonl_round_trip(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    assert list(Documents([path])) == [text for text in texts if text]
