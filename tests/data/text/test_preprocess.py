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
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megarewarm.data.text.preprocess.documents import Documents, first_bytes
from megarewarm.data.text.preprocess.python_source import split_source, strip_doctests
from megarewarm.data.text.preprocess.records import BAD_JSON, BAD_UTF8, EMPTY, NO_TEXT
from megarewarm.errors import UserError

TEXTS = ["héllo wörld", "a\u2028b\nsecond line\n", "   ", "x" * 5000, "日本語 text"]


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
    skipped = documents.skipped
    assert skipped.counts == {BAD_JSON: 1, NO_TEXT: 3, BAD_UTF8: 2, EMPTY: 2} and skipped.broken == 6
    assert skipped.examples[0].startswith(f"{path}:2: not valid JSON")
    assert "known: other" in skipped.examples[1] and len(skipped.examples) == 5


def test_a_file_without_any_valid_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 3)
    with pytest.raises(UserError, match=r"no document is valid.*a\.jsonl:1: no key 'text'"):
        list(Documents([tmp_path / "a.jsonl"]))
    with pytest.raises(UserError, match="does not exist"):
        Documents([tmp_path / "missing.txt"])
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match="no known kind"):
        Documents([tmp_path / "a.csv"])


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
