"""The .idx of a token file, as GPT-NeoX and Megatron-LM write it: opening, checks, reading of ranges.

Little-endian: ``MMIDIDX\\0\\0``, u64 version 1, u8 dtype code, u64 N, u64 D, i32 sizes (N,) in tokens, i64 pointers
(N,) in bytes, i64 document index (D,), and i8 modes (N,) in multimodal files only. Nothing is aligned.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megarewarm.data.files.file_bytes import FileBytes
from megarewarm.errors import UserError

log = logging.getLogger(__name__)

MAGIC = b"MMIDIDX\x00\x00"
OLD_MAGIC = b"TNTIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")

# Codes 6 and 7 are float32 and float64 in GPT-NeoX, the other way round in Megatron-LM: neither holds token ids.
CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
FLOAT_CODES = (6, 7)

SAMPLED_BLOCKS = 64
CHECK_WHOLE = 2**18  # documents in memory at a time while all of them are checked


@dataclass(frozen=True)
class Index:
    """An opened .idx of ``count`` sequences, of which ranges are read on demand."""

    path: Path
    dtype: np.dtype
    count: int
    entries: int
    bytes: FileBytes

    def sizes(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Tokens of the sequences [first, last)."""
        return self.bytes.read(HEADER.size + 4 * first, last - first, "<i4").astype(np.int64)

    def pointers(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """First bytes in the .bin of the sequences [first, last)."""
        return self.bytes.read(HEADER.size + 4 * self.count + 8 * first, last - first, "<i8")

    def documents(self) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """The ``entries`` of the document index in blocks: (number of the first, entries)."""
        for first, last in ranges(self.entries, 2**20):
            yield first, self.bytes.read(HEADER.size + 12 * self.count + 8 * first, last - first, "<i8")

    def pointers_at(self, sequences: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """First bytes in the .bin of any sequences, (n,)."""
        return self.bytes.gather(HEADER.size + 4 * self.count + 8 * sequences, np.ones_like(sequences), np.dtype("<i8"))


def open_index(path: Path) -> Index:
    """Open and check an .idx. Raises ``UserError`` for another format and for an inconsistent or damaged file. A document
    index that is ``[0]``, as GPT-NeoX's merging tool leaves it, is tolerated with a warning."""
    size = path.stat().st_size
    file = FileBytes(path)
    head = file.read(0, min(size, HEADER.size), "u1").tobytes()
    if head.startswith(OLD_MAGIC):
        raise UserError(
            f"{path} is a TNTIDX index ('lazy' or 'cached' data of old GPT-NeoX and Megatron), which is not read: "
            f"preprocess the text again, or convert it with GPT-NeoX's data_impl 'mmap'"
        )
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise UserError(
            f"{path} is not a token index: it starts with {head[:9]!r}, expected {MAGIC!r} and a header of 34 bytes"
        )
    _, version, code, count, documents = HEADER.unpack(head)
    if version != 1:
        raise UserError(f"{path} is of index version {version}, only version 1 is known")
    if code in FLOAT_CODES:
        raise UserError(f"{path} says the data are floating-point numbers (dtype code {code}), expected token ids")
    if code not in CODES:
        raise UserError(f"{path} has dtype code {code}, expected one of {sorted(CODES)}: the file is damaged")
    expected = HEADER.size + 12 * count + 8 * documents
    if size not in (expected, expected + count):
        raise UserError(
            f"{path} has {size} bytes, expected {expected} (or {expected + count} with modes) for {count} "
            f"sequences and {documents} document entries: it is "
            f"{'truncated' if size < expected else 'too long'}, make or copy it again"
        )
    if size != expected:
        _check_modes(file, expected, count)
    _check_document_index(file, HEADER.size + 12 * count, documents, count)
    index = Index(path, np.dtype(CODES[code]).newbyteorder("<"), count, documents, file)
    _check_pointers(index)
    return index


def _check_modes(file: FileBytes, offset: int, count: int) -> None:
    for first, last in ranges(count, 2**20):
        modes = file.read(offset + first, last - first, "i1")
        if modes.any():
            bad = int(np.argmax(modes != 0))
            raise UserError(
                f"{file.path}: sequence {first + bad} is of mode {modes[bad]}, expected 0 (text): multimodal data are not read"
            )


def _check_document_index(file: FileBytes, offset: int, documents: int, count: int) -> None:
    ends = [int(file.read(offset + 8 * i, 1, "<i8")[0]) for i in ([0, documents - 1] if documents else [])]
    if documents == 1 and count and ends[0] == 0:
        log.warning("%s has no document index (a merged file): every sequence is taken as a document", file.path)
    elif ends != [0, count]:
        found = "..".join(map(str, ends)) or "nothing"
        raise UserError(f"{file.path}: its document index covers {found}, expected 0..{count}: make the file again")


def _check_pointers(index: Index) -> None:
    """Every size and every pointer: flat reading is right only where each document starts at the byte at which the one before
    it ends. One pass over 12 bytes a document in constant memory, 15 ms of CPU for a million of them."""
    expected = 0
    for first, last in ranges(index.count, CHECK_WHOLE):
        sizes, pointers = index.sizes(first, last), index.pointers(first, last)
        if (sizes < 0).any():
            bad = int(np.argmax(sizes < 0))
            raise UserError(
                f"{index.path}: sequence {first + bad} has {sizes[bad]} tokens (the index says so at its byte "
                f"{HEADER.size + 4 * (first + bad)}): it is damaged, make or copy it again"
            )
        ends = expected + np.cumsum(sizes) * index.dtype.itemsize
        starts = np.concatenate([[expected], ends[:-1]])
        if not np.array_equal(starts, pointers):
            bad = int(np.argmax(starts != pointers))
            place = HEADER.size + 4 * index.count + 8 * (first + bad)
            raise UserError(
                f"{index.path}: {f'sequence {first + bad}' if first + bad else 'the first sequence'} starts at byte "
                f"{pointers[bad]}, expected {starts[bad]}, where the one before it ends by its size (the index says so at its "
                f"byte {place}): it is damaged, make or copy it again; only files without gaps are read, write the documents "
                f"of others into a new file"
            )
        expected = int(ends[-1])


def blocks(total: int, block: int, count: int) -> list[tuple[int, int]]:
    """``count`` evenly spaced ranges of ``block`` in range(total), first and last included; all of it if that fits."""
    if total <= block * count:
        return ranges(total, block)
    starts = [(total - block) * i // (count - 1) for i in range(count)]
    return [(start, start + block) for start in starts]


def ranges(total: int, block: int) -> list[tuple[int, int]]:
    return [(first, min(first + block, total)) for first in range(0, total, block)]
