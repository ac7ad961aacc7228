"""Task files made of documents: which of several continuations of a context is the real one.

The others come from other documents and have the same number of bytes. Which documents, where they are cut and in which order
the choices are, follows from digests of the seed and the texts: the same documents give the same file, in any order.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from megarewarm.errors import UserError
from megarewarm.spelling import counted

_SPARE = 64  # documents that are kept beside those that items need, for those whose bytes don't end with a character
_SPACE = re.compile(rb"(?<=[^\x00-\x20]) (?=[^\x00-\x20])")  # between two words of a line
_CHARACTER = re.compile(rb"[^\x80-\xbf]")  # its first byte in UTF-8


@dataclass(frozen=True)
class Continuations:
    """``items``, each of a document of its own, of ``choices`` continuations. ``context_bytes``: of the context, or a little
    less, since it begins with a word; ``continuation_bytes``: of each choice, in UTF-8, or up to 3 less."""

    items: int
    choices: int
    context_bytes: int
    continuation_bytes: int
    seed: int

    def __post_init__(self) -> None:
        for name, least in (("items", 1), ("choices", 2), ("context_bytes", 1), ("continuation_bytes", 4)):
            if (found := getattr(self, name)) < least:
                raise UserError(f"{name} {found}: expected at least {least}")


@dataclass(frozen=True)
class MadeTask:
    """``lines``: the task file; ``documents``: how many different ones were read, and how many of them are long enough."""

    lines: bytes
    documents: int
    usable: int


@dataclass(frozen=True)
class _Document:
    """``text`` in UTF-8. ``cuts``: where a continuation of the asked length may begin, ascending; ``spaced``: at spaces."""

    text: bytes
    cuts: list[int]
    spaced: bool


def make_task(texts: Iterable[str], asked: Continuations, source: str) -> MadeTask:
    """The items that are ``asked`` of the documents ``texts``, which are read once.

    Memory: about ``items`` documents, and 100 bytes for each that is read. Raises ``UserError``, which names ``source``, where
    too few documents are long enough.
    """
    kept: list[tuple[int, bytes]] = []  # a heap of negative digests: the largest goes first
    seen: set[bytes] = set()
    usable, wanted = 0, max(asked.items, asked.choices)
    for text in texts:
        data = text.encode()
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest in seen:
            continue
        seen.add(digest)
        if next(_cuts(data, asked), None) is None:
            continue
        usable += 1
        entry = (-_draw(2**64, asked.seed, digest), data)
        if len(kept) < wanted + _SPARE:
            heapq.heappush(kept, entry)
        else:
            heapq.heappushpop(kept, entry)
    documents = [_Document(data, list(_cuts(data, asked)), b" " in data) for _, data in sorted(kept, reverse=True)]
    items = (item for number in range(len(documents)) if (item := _item(documents, number, asked)) is not None)
    lines = [json.dumps(item, ensure_ascii=False).encode() + b"\n" for item in islice(items, asked.items)]
    if len(lines) < asked.items:
        each = f"{asked.context_bytes} + {asked.continuation_bytes} bytes"
        raise UserError(
            f"{source}: {counted(asked.items, 'item')} of {asked.choices} choices need as many different documents of {each}, "
            f"there are {counted(usable, 'such document')} of {len(seen):,}, which give {len(lines):,}: ask for fewer items or "
            f"shorter ones, or give more documents (a .txt is divided by lines '<|endoftext|>')"
        )
    return MadeTask(b"".join(lines), len(seen), usable)


def _cuts(data: bytes, asked: Continuations) -> Iterator[int]:
    """Where a continuation may begin: at spaces between words; in a text without any, at all characters."""
    first, last = asked.context_bytes, len(data) - asked.continuation_bytes
    if first <= last:
        found = _SPACE.finditer(data, first, last + 2) if b" " in data else _CHARACTER.finditer(data, first, last + 1)
        yield from (match.start() for match in found)


def _begins(data: bytes, at: int) -> bool:
    """Whether a character begins at ``at``, or the text ends there."""
    return at == len(data) or data[at] & 0xC0 != 0x80


def _item(documents: list[_Document], number: int, asked: Continuations) -> dict[str, object] | None:
    """The item of document ``number``; None if the others have too few continuations of its length."""
    own = documents[number]
    cut = own.cuts[_draw(len(own.cuts), asked.seed, "cut", own.text)]
    end = next(at for at in range(cut + asked.continuation_bytes, cut, -1) if _begins(own.text, at))
    choices = [own.text[cut:end]]
    for other in _shuffled(len(documents), asked.seed, own.text):
        document = documents[other]
        if other == number or document.spaced != own.spaced:
            continue
        choice = _of_size(document, end - cut, _draw(len(document.cuts), asked.seed, "wrong", own.text, document.text))
        if choice is not None and choice not in choices:  # an equal one would be as right
            choices.append(choice)
        if len(choices) == asked.choices:
            break
    else:
        return None
    start = next(at for at in range(cut - asked.context_bytes, cut) if _begins(own.text, at))
    if own.spaced and start and own.text[start - 1] > 32 and (gap := re.compile(rb"\s+").search(own.text, start, cut)):
        start = gap.end()
    answer = _draw(asked.choices, asked.seed, "answer", own.text)
    choices.insert(answer, choices.pop(0))
    return {"context": own.text[start:cut].decode(), "choices": [choice.decode() for choice in choices], "answer": answer}


def _of_size(document: _Document, size: int, first: int) -> bytes | None:
    """The ``size`` bytes from the first of its cuts on, counted from cut ``first``, after which they end with a character."""
    cuts, text = document.cuts, document.text
    at = next((cut for cut in (*cuts[first:], *cuts[:first]) if _begins(text, cut + size)), None)
    return None if at is None else text[at : at + size]


def _draw(below: int, *what: object) -> int:
    """A number from 0 to ``below`` - 1 that follows from ``what``."""
    digest = hashlib.blake2b(digest_size=16)
    for each in what:
        digest.update(hashlib.blake2b(each if isinstance(each, bytes) else str(each).encode()).digest())
    return int.from_bytes(digest.digest(), "little") % below


def _shuffled(count: int, *what: object) -> Iterator[int]:
    """The numbers from 0 to ``count`` - 1 in an order that follows from ``what``, made as far as it is read."""
    moved: dict[int, int] = {}
    for last in range(count, 0, -1):
        at = _draw(last, *what, last)
        yield moved.get(at, at)
        moved[at] = moved.get(last - 1, last - 1)
