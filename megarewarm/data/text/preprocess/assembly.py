"""Shards put together: each piece of an output file is written at its own place, by any free worker.

Where order is kept a piece is a shard. Where documents are shuffled, the order is that of their 64-bit keys; a piece is a
range of keys that holds about 64 MB of ids: of each run its documents in that range, merged. So nothing but one piece is
ever in memory, and the result does not depend on who wrote what.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from megarewarm import files
from megarewarm.data.files.index_file import CODES, HEADER, MAGIC, ranges
from megarewarm.data.text.preprocess.shard import Tokenised, stem
from megarewarm.files import sync

_PIECE = 2**26  # bytes of ids in a piece
_BLOCK = 2**20  # documents, or 8 of them bytes, in memory at a time

Source = tuple[Path, tuple[tuple[int, int], ...]]
"""(a shard's files without suffix, the ranges of documents that are its runs)"""


@dataclass(frozen=True)
class Output:
    """The files of a part of the split while they are being written; ``index`` is None for a bare .bin."""

    data: Path
    index: Path | None
    dtype: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class Piece:
    """Documents of ``sources`` with keys in [low, high), or all of them, in their order, where ``low`` is None. They begin
    at document ``first_document`` and token ``first_token`` of the output. ``bytes``: of ids."""

    output: Output
    sources: tuple[Source, ...]
    low: int | None
    high: int
    first_document: int
    first_token: int
    bytes: int


def sources_of(folder: Path, shards: Sequence[Tokenised], part: str) -> list[Source]:
    """Where the documents of a part lie."""
    found = []
    for shard in shards:
        runs = shard.runs[part] or [shard.parts[part].documents]
        bounds = np.cumsum([0, *runs]).tolist()
        found.append((stem(folder, shard.number, part), tuple(itertools.pairwise(bounds))))
    return found


def create(output: Output) -> None:
    """Make the output's files at their full size, with the parts of the index that depend on nothing else."""
    size = np.dtype(output.dtype).itemsize
    with open(output.data, "wb") as file:
        file.truncate(output.tokens * size)
    if output.index is None:
        return
    n = output.documents
    code = next(code for code, name in CODES.items() if name == output.dtype)
    with open(output.index, "wb", buffering=2**20) as file:
        file.write(HEADER.pack(MAGIC, 1, code, n, n + 1))
        file.seek(HEADER.size + 12 * n)
        for first, last in ranges(n + 1, _BLOCK):
            file.write(np.arange(first, last, dtype="<i8").tobytes())


def pieces(output: Output, sources: Sequence[Source], *, shuffled: bool) -> Iterator[Piece]:
    """The pieces of an output, which together are all of it."""
    size = np.dtype(output.dtype).itemsize
    document = token = 0
    if not shuffled:
        for source in sources:
            ends = _ends(source)
            if len(ends):
                yield Piece(output, (source,), None, 0, document, token, int(ends[-1]) * size)
                document, token = document + len(ends), token + int(ends[-1])
        return
    count = max(1, -(-output.tokens * size // _PIECE))
    bounds = [i * 2**64 // count for i in range(count + 1)]
    inner = np.array(bounds[1:-1], np.uint64)
    documents, tokens = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for source in sources:
        ends, keys = _ends(source), _keys(source)
        for first, last in source[1]:
            at = np.concatenate([[first], first + np.searchsorted(keys[first:last], inner), [last]])
            documents += np.diff(at)
            before = np.where(at > 0, ends[np.maximum(at - 1, 0)], 0) if len(ends) else np.zeros(count + 1, np.int64)
            tokens += np.diff(before)
    for i in range(count):
        if documents[i]:
            yield Piece(output, tuple(sources), bounds[i], bounds[i + 1], document, token, int(tokens[i]) * size)
        document, token = document + int(documents[i]), token + int(tokens[i])


def write(piece: Piece) -> int:
    """Write a piece at its place. Returns its bytes."""
    if piece.low is None:
        _copy(piece)
    else:
        _merge(piece)
    return piece.bytes


def sha256(path: Path) -> str:
    """Of a whole file, after it has been brought onto the disk."""
    with open(path, "rb") as file:
        sync(file)
    return files.sha256(path)


def _copy(piece: Piece) -> None:
    ((path, _),) = piece.sources
    size = np.dtype(piece.output.dtype).itemsize
    offset = piece.first_token * size
    with open(f"{path}.bin", "rb") as source, open(piece.output.data, "r+b") as target:
        target.seek(offset)
        while block := source.read(2**22):
            target.write(block)
    ends = _ends(piece.sources[0])
    with _IndexPlaces(piece.output) as index:
        for first, last in ranges(len(ends), _BLOCK):
            start = int(ends[first - 1]) if first else 0
            sizes = np.diff(ends[first:last], prepend=start)
            index.write(piece.first_document + first, piece.first_token + start, sizes)


def _merge(piece: Piece) -> None:
    assert piece.low is not None
    keys: list[npt.NDArray[np.uint64]] = []
    sizes: list[npt.NDArray[np.int64]] = []
    tokens: list[npt.NDArray[np.generic]] = []
    kind = np.dtype(piece.output.dtype)
    for source in piece.sources:
        ends, own = _ends(source), _keys(source)
        for begin, end in source[1]:
            first = begin + int(np.searchsorted(own[begin:end], np.uint64(piece.low)))
            last = end if piece.high == 2**64 else begin + int(np.searchsorted(own[begin:end], np.uint64(piece.high)))
            if first == last:
                continue
            start = int(ends[first - 1]) if first else 0
            keys.append(np.array(own[first:last]))
            sizes.append(np.diff(ends[first:last], prepend=start))
            count = int(ends[last - 1]) - start
            tokens.append(np.fromfile(f"{source[0]}.bin", kind, count, offset=start * kind.itemsize))
    order = np.argsort(np.concatenate(keys), kind="stable")
    documents = [part for ids, counts in zip(tokens, sizes, strict=True) for part in np.split(ids, np.cumsum(counts)[:-1])]
    with open(piece.output.data, "r+b", buffering=2**22) as target:
        target.seek(piece.first_token * kind.itemsize)
        for i in order:
            target.write(documents[i].data)
    with _IndexPlaces(piece.output) as index:
        index.write(piece.first_document, piece.first_token, np.concatenate(sizes)[order])


class _IndexPlaces:
    """An output's index, open for writing of the entries of some documents."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._file: IO[bytes] | None = None

    def __enter__(self) -> _IndexPlaces:
        if self._output.index is not None:
            self._file = open(self._output.index, "r+b")
        return self

    def write(self, document: int, token: int, sizes: npt.NDArray[np.int64]) -> None:
        """Entries of the documents from ``document`` on, which begin at ``token`` and have ``sizes`` (n,)."""
        if self._file is None:
            return
        itemsize = np.dtype(self._output.dtype).itemsize
        starts = (token + np.cumsum(sizes) - sizes) * itemsize
        self._file.seek(HEADER.size + 4 * document)
        self._file.write(sizes.astype("<i4").tobytes())
        self._file.seek(HEADER.size + 4 * self._output.documents + 8 * document)
        self._file.write(starts.astype("<i8").tobytes())

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()


def _ends(source: Source) -> npt.NDArray[np.int64]:
    return _mapped(Path(f"{source[0]}.ends"), np.dtype("<i8"))


def _keys(source: Source) -> npt.NDArray[np.uint64]:
    return _mapped(Path(f"{source[0]}.keys"), np.dtype("<u8"))


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    if not path.stat().st_size:
        return np.empty(0, dtype)
    try:
        return np.memmap(path, dtype, "r")
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        return np.fromfile(path, dtype)  # some FUSE file systems can't map files
