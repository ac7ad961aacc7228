"""Lines of files that may be compressed, without holding more than one of them."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from megarewarm.errors import UserError

COMPRESSED = (".gz", ".zst")

_CHUNK = 2**20  # bytes of a file in memory at a time


def lines_between(path: Path, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """(offset, line with its end) of the lines of a plain file that begin in [start, stop); stop None: the end.

    Only b"\n" ends a line: other separators may occur inside JSON text. Ranges that cover a file give each line once.
    """
    with open(path, "rb", buffering=_CHUNK) as file:
        offset = start
        if start:
            file.seek(start - 1)
            offset += len(file.readline()) - 1  # the line that holds the byte before belongs to an earlier range
        for line in file:
            if stop is not None and offset >= stop:
                return
            yield offset, line
            offset += len(line)


def lines_of(path: Path, file: IO[bytes], read: Callable[[int], None]) -> Iterator[tuple[int, bytes]]:
    """(offset in the decompressed content, line with its end) of an opened file; ``read`` gets the bytes of it so far.
    Raises ``UserError`` if compressed data are damaged or end early."""
    offset = 0
    for line in _lines(_counted(_decompressed(path, file), file, read)):
        yield offset, line
        offset += len(line)


def _counted(chunks: Iterable[bytes], file: IO[bytes], read: Callable[[int], None]) -> Iterator[bytes]:
    for chunk in chunks:
        if file.seekable():
            read(file.tell())
        yield chunk


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    pieces: list[bytes] = []
    for chunk in chunks:
        lines = chunk.split(b"\n")
        pieces.append(lines[0])
        for line in lines[1:]:
            yield b"".join(pieces) + b"\n"
            pieces = [line]
    if rest := b"".join(pieces):
        yield rest


def _decompressed(path: Path, file: IO[bytes]) -> Iterator[bytes]:
    try:
        if path.suffix == ".zst":
            yield from _unzstd(path, file)
            return
        source = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
        while chunk := source.read(_CHUNK):
            yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not whole: {error}: make or copy it again") from error


def _unzstd(path: Path, file: IO[bytes]) -> Iterator[bytes]:
    """By hand, because ``zstandard``'s stream reader takes a file that is cut off for one that ends."""
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{path} needs the package 'zstandard': pip install zstandard") from error
    # dumps often have windows beyond the default limit (zstd --long=31)
    unpacker = zstandard.ZstdDecompressor(max_window_size=2**31)
    decompressor = unpacker.decompressobj()
    inside = False
    while data := file.read(_CHUNK // 8):
        while data:
            try:
                yield decompressor.decompress(data)
            except zstandard.ZstdError as error:
                raise UserError(f"{path} is not a whole .zst file: {error}: make or copy it again") from error
            inside, data = not decompressor.eof, decompressor.unused_data
            if not inside:
                decompressor = unpacker.decompressobj()
    if inside:
        raise UserError(f"{path} is not a whole .zst file: it ends in the middle of its data: make or copy it again")
