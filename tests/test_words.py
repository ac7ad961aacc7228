"""The words that docs/style.md lists don't come back into documents, docstrings, comments and messages."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STYLE = ROOT / "docs" / "style.md"
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")} - {STYLE})
SOURCES = sorted(
    path for folder in ("megarewarm", "kernels") for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts
)
ALLOWED = re.compile(r"\bstands? (in )?for\b|\bstand-ins?\b", re.IGNORECASE)


def _words() -> list[str]:
    section = STYLE.read_text(encoding="utf-8").partition("## Words that must not come back")[2]
    cells = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", section, re.MULTILINE)[1:]
    return [word for cell in cells for word in cell.split(", ")]


WORDS = re.compile(rf"\b({'|'.join(map(re.escape, _words()))})\b", re.IGNORECASE)


def _found(text: str) -> list[str]:
    text = ALLOWED.sub("", " ".join(text.split()))
    return [text[max(0, match.start() - 30) : match.end() + 30] for match in WORDS.finditer(text)]


def _texts(source: str) -> Iterator[tuple[int, str]]:
    """Lines and texts of the strings (of f-strings what is not code) and of the comments, those of one block together."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    block: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if block and token.start[0] != block[-1].start[0] + 1:
                yield block[0].start[0], " ".join(each.string.lstrip("# ") for each in block)
                block = []
            block.append(token)
    if block:
        yield block[0].start[0], " ".join(each.string.lstrip("# ") for each in block)


def test_the_list_is_read() -> None:
    assert {"anew", "kin", "told", "stands", "mended"} <= set(_words()) and len(_words()) > 30
    assert _found("All of it is begun\nanew: it stands, as 'x' stands for y") and not _found("standard, kind, stands for")
    assert [line for line, text in _texts('x = f"a {anew} b"  # one\ny = 1  # dear\n') if _found(text)] == [1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages(page: Path) -> None:
    assert _found(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_strings_and_comments(path: Path) -> None:
    assert [(line, found) for line, text in _texts(path.read_text(encoding="utf-8")) for found in _found(text)] == []
