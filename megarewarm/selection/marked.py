"""Two texts as HTML, with the words marked that only one of them has."""

from __future__ import annotations

import difflib
import re
from html import escape

_WORDS = 600
"""Words of each text that are compared; the rest is shown without marks."""


def marked(one: str, other: str) -> tuple[str, str]:
    """(``one``, ``other``) as HTML."""
    a, b = re.findall(r"\s+|\w+|[^\w\s]", one), re.findall(r"\s+|\w+|[^\w\s]", other)
    found = difflib.SequenceMatcher(None, a[:_WORDS], b[:_WORDS], autojunk=False).get_opcodes()
    left, right = "", ""
    for kind, i, j, k, m in found:
        same = kind == "equal"
        left += _shown("".join(a[i:j]), same)
        right += _shown("".join(b[k:m]), same)
    return left + escape("".join(a[_WORDS:])), right + escape("".join(b[_WORDS:]))


def _shown(text: str, same: bool) -> str:
    return escape(text) if same or not text else f"<mark>{escape(text)}</mark>"
