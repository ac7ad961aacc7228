#!/usr/bin/env python3
"""German text for configs/experiments/language_mini.yml: python benchmarks/language_data.py UNPACKED_DEB ... > german.jsonl

Reads the .html files and German manual pages of Debian packages that 'dpkg-deb -x' unpacked, a document each. A line of more
than 20 characters is kept only where it first occurs, so that menus, licences and phrases of every page do not return in the
held-out documents. Documents are in the order of their hash, so that a limit leaves some of all packages.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

MIN_CHARACTERS, MIN_REPEATED = 400, 20

_HIDDEN = re.compile(r"(?is)<(script|style|head|nav|footer|aside|noscript).*?</\1>")
_BLOCK_END = re.compile(r"(?i)</(p|div|h[1-6]|li|tr|table|ul)>")
_TAG = re.compile(r"(?s)<[^>]+>")
_FONTS = "SH|SS|B|I|BR|IR|RB|RI|BI|IB|SM|IP"  # macros whose arguments are text
_MACRO = re.compile(rf"^[.'](?:(?:{_FONTS})\b ?|.*)")
_ESCAPES = ((r"\\f(?:[BIRPCW]|\(..|\[[^\]]*\])|\\&|\\/|\\,|\\\((?:..)", ""), (r"\\-", "-"), (r"\\[~ ]", " "), (r"\\e", r"\\"))


def text_of_html(source: str) -> str:
    """The text of a page, a line for each block."""
    text = html.unescape(_TAG.sub("", _BLOCK_END.sub("\n", _HIDDEN.sub("", source))))
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"[ \t\xa0]+", " ", text)).strip()


def text_of_manual(source: str) -> str:
    """The text of a manual page in roff, without its macros."""
    lines = []
    for line in source.splitlines():
        line = _MACRO.sub("", line).strip('"')
        for pattern, instead in _ESCAPES:
            line = re.sub(pattern, instead, line)
        lines.append(line.strip())
    return "\n".join(filter(None, lines))


def documents(folders: list[Path]) -> Iterator[tuple[str, str]]:
    """(digest of the path in its package, text)"""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.suffix == ".html":
                text = text_of_html(path.read_text(encoding="utf-8", errors="ignore"))
            elif "/man/de/" in name and path.suffix == ".gz":
                text = text_of_manual(gzip.decompress(path.read_bytes()).decode("utf-8", errors="ignore"))
            else:
                continue
            yield hashlib.sha256(name.encode()).hexdigest(), text


def main() -> None:
    """Write a JSON line for each document to standard output."""
    folders = [Path(name) for name in sys.argv[1:]]
    if not folders or not all(folder.is_dir() for folder in folders):
        raise SystemExit(__doc__)
    seen: set[str] = set()
    for _, text in sorted(documents(folders)):
        kept = []
        for line in text.split("\n"):
            if len(line) <= MIN_REPEATED or line not in seen:
                kept.append(line)
                seen.add(line)
        if len(document := "\n".join(kept)) > MIN_CHARACTERS:
            sys.stdout.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
