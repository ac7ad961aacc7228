"""Python sources taken apart into prose, which is their docstrings, and code, which is the rest."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator


def split_source(source: str) -> tuple[list[str], str]:
    """(docstrings, the source without them). What is left is valid Python. Raises what ``ast.parse`` does."""
    data = source.encode()
    line_starts = [0]
    for line in data.split(b"\n"):
        line_starts.append(line_starts[-1] + len(line) + 1)
    docstrings: list[str] = []
    pieces: list[bytes] = []
    end = 0
    for node in _owners(ast.parse(source)):
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        docstrings.append(docstring)
        # All strings that open the body, or the second would be the docstring of what is left.
        count = next((i for i, item in enumerate(node.body) if not _is_text(item)), len(node.body))
        first, last = node.body[0], node.body[count - 1]
        assert last.end_lineno is not None and last.end_col_offset is not None
        start = line_starts[first.lineno - 1] + first.col_offset
        stop = line_starts[last.end_lineno - 1] + last.end_col_offset
        pieces.append(data[end:start])
        end = stop
        if count == len(node.body) and not isinstance(node, ast.Module):
            pieces.append(b"pass")
            continue
        if semicolon := re.compile(rb"[ \t]*;[ \t]*").match(data, stop):
            end = semicolon.end()
        line_end = re.compile(rb"[ \t]*(\n|\Z)").match(data, end)
        margin = data[line_starts[first.lineno - 1] : start]
        if line_end and not margin.strip():
            pieces[-1] = pieces[-1][: len(pieces[-1]) - len(margin)]
            end = line_end.end()
    pieces.append(data[end:])
    return docstrings, b"".join(pieces).decode()


def strip_doctests(text: str) -> str:
    """``text`` without its interactive examples: from ``>>>`` to the next blank line, as ``doctest`` sees them."""
    kept = []
    inside = False
    for line in text.split("\n"):
        bare = line.strip()
        inside = bare.startswith(">>>") or (inside and bool(bare))
        if not inside:
            kept.append(line)
    return re.sub(r"\n(?:[ \t]*\n){2,}", "\n\n", "\n".join(kept)).strip()


def _owners(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """All that can have a docstring, in the order of the source. Expressions are not entered: they hold none."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        for name in ("finalbody", "orelse", "handlers", "cases", "body"):
            stack.extend(reversed(getattr(node, name, ())))


def _is_text(item: ast.stmt) -> bool:
    return isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant) and isinstance(item.value.value, str)
