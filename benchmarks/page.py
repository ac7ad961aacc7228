"""Measured tables in a page of the documents: each between two marks, which are comments of the page."""

from __future__ import annotations


def put(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between the marks of ``name``. Raises ``SystemExit`` where the page has no such marks."""
    begin, end = (f"<!-- {name}: {word} -->" for word in ("begin", "end"))
    if begin not in page or end not in page:
        raise SystemExit(f"the page has no lines '{begin}' and '{end}'")
    return f"{page.split(begin)[0]}{begin}\n{text}\n{end}{page.split(end)[1]}"
