"""What a step of a selection is: it looks at the documents that the steps before it kept, and chooses some to drop.

Documents are numbered through all files of a ``Corpus``. A step's choice must not depend on the order of the input: it breaks
ties by digests.py, never by a document's number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megarewarm.data.files.token_file import TokenFile
from megarewarm.selection.desk import Desk

Numbers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

BLOCK = 2**21
"""Tokens in memory at a time, or one document, if that is longer."""


@dataclass(frozen=True)
class Block:
    """Some documents with their content: document ``documents[i]`` is ``ids[starts[i] : starts[i] + sizes[i]]``, without the
    end-of-document token at its end. ``ids``: in the file's dtype, read-only."""

    documents: Numbers
    ids: npt.NDArray[Any]
    starts: Numbers
    sizes: Numbers

    def contents(self) -> Iterator[npt.NDArray[Any]]:
        """The ids of one document after another."""
        for start, size in zip(self.starts.tolist(), self.sizes.tolist(), strict=True):
            yield self.ids[start : start + size]


@dataclass(frozen=True)
class Corpus:
    """Token ``files``, whose documents are numbered through, 0 to ``num_documents`` - 1. ``ends``: for each file the id that
    ends its documents, which is not content, or None."""

    files: tuple[TokenFile, ...]
    ends: tuple[int | None, ...]

    @cached_property
    def firsts(self) -> Numbers:
        """The number of the first document of each file, and of all documents, (files + 1,)."""
        return np.cumsum([0, *(file.num_documents for file in self.files)]).astype(np.int64)

    @property
    def num_documents(self) -> int:
        return int(self.firsts[-1])

    @cached_property
    def sizes(self) -> Numbers:
        """Tokens of every document, with the one that ends it, (num_documents,)."""
        return np.concatenate([file.sizes for file in self.files]) if self.files else np.empty(0, np.int64)

    def file_of(self, documents: Numbers) -> Numbers:
        """The index in ``files`` of the file that holds each document."""
        return np.searchsorted(self.firsts, documents, side="right") - 1

    def members(self, kept: Mask, file: int) -> Numbers:
        """The numbers of the documents of a file that are ``kept``, ascending."""
        first, last = self.firsts[file], self.firsts[file + 1]
        return first + np.flatnonzero(kept[first:last])

    def bytes_of(self, documents: Numbers) -> int:
        """Bytes of the ids of ``documents``, for progress."""
        widths = np.array([file.dtype.itemsize for file in self.files], np.int64)
        return int((self.sizes[documents] * widths[self.file_of(documents)]).sum()) if documents.size else 0

    def content(self, document: int) -> npt.NDArray[Any]:
        """The ids of one document, without the token that ends it."""
        index = int(np.searchsorted(self.firsts, document, side="right")) - 1
        ids = self.files[index].document(document - int(self.firsts[index]))
        end = self.ends[index]
        return ids[:-1] if ids.size and end is not None and int(ids[-1]) == end else ids

    def blocks(self, documents: Numbers, tokens: int = BLOCK) -> Iterator[Block]:
        """``documents`` (ascending) with their content, in blocks of at most ``tokens`` tokens, at least one document each;
        no block holds documents of two files."""
        bounds = np.searchsorted(documents, self.firsts)
        for index, file in enumerate(self.files):
            mine = documents[bounds[index] : bounds[index + 1]]
            begin = 0
            while begin < len(mine):
                sizes = self.sizes[mine[begin : begin + 2**16]]
                count = max(1, int(np.searchsorted(np.cumsum(sizes), tokens, side="right")))
                yield self._block(file, self.ends[index], mine[begin : begin + count], sizes[:count], int(self.firsts[index]))
                begin += count

    def _block(self, file: TokenFile, end: int | None, documents: Numbers, sizes: Numbers, first: int) -> Block:
        local = documents - first
        if int(local[-1]) - int(local[0]) == len(local) - 1:
            ids = file.read(file.document_start(int(local[0])), int(sizes.sum()))
        else:
            ids = file.read_pieces(file.starts_of(local), sizes)
        after = np.cumsum(sizes)
        content = sizes.copy()
        if end is not None:
            filled = np.flatnonzero(sizes)
            content[filled] -= ids[after[filled] - 1] == end
        return Block(documents, ids, after - sizes, content)


@dataclass(frozen=True)
class Examples:
    """Documents to look at, such as those of the lowest scores, each with its number."""

    title: str
    documents: Numbers
    scores: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Counterpart:
    """A document and what it is like outside of the corpus: the ids of that, and where it is from, for people."""

    document: int
    place: str
    ids: npt.NDArray[Any]


@dataclass(frozen=True)
class ClusterMap:
    """A picture of some documents: their ``places``, (m, 2), their ``clusters``, (m,), and whether each was ``dropped``."""

    title: str
    documents: Numbers
    places: npt.NDArray[np.float64]
    clusters: Numbers
    dropped: Mask


@dataclass(frozen=True)
class Chosen:
    """What a step drops. ``dropped``: document numbers, ascending; ``because``: for each the document of which it is a
    duplicate (one that stays, but for SemDeDup), -1 where that is not the reason; ``score``: the similarity or score that
    decided, NaN without. ``notes``: lines for people; ``maps``, ``examples`` and ``beside``: for the page."""

    dropped: Numbers
    because: Numbers
    score: npt.NDArray[np.float64]
    notes: Sequence[str] = ()
    maps: Sequence[ClusterMap] = ()
    examples: Sequence[Examples] = ()
    beside: Sequence[Counterpart] = ()


class Step(Protocol):
    """A step. ``name``: one word; ``words``: what it does, for people; ``settings``: everything but the documents that its
    choice depends on, as JSON, also identities of models and files."""

    @property
    def name(self) -> str: ...

    @property
    def words(self) -> str: ...

    @property
    def settings(self) -> Mapping[str, Any]: ...

    def choose(self, corpus: Corpus, kept: Mask, desk: Desk) -> Chosen:
        """Which of the ``kept`` documents, (num_documents,) bool, to drop. ``desk``: progress and arrays on the disk. Raises
        ``UserError``."""
