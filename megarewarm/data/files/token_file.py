"""Token files: reading and writing of .bin/.idx pairs (GPT-NeoX, Megatron-LM), reading of bare .bin files of ids. The .bin
holds the ids of all documents one after the other and nothing else; index_file.py describes the .idx."""

from __future__ import annotations

import hashlib
import os
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megarewarm.data.files.file_bytes import AnyBytes, open_bin
from megarewarm.data.files.index_file import (
    CHECK_WHOLE,
    CODES,
    HEADER,
    MAGIC,
    SAMPLED_BLOCKS,
    Index,
    blocks,
    open_index,
    ranges,
)
from megarewarm.data.files.manifest import manifest_of
from megarewarm.errors import UserError
from megarewarm.files import NewFile, sync_folder

BARE_DTYPES = ("uint16", "uint32", "int32")

KEEP_STARTS = 2**22  # documents whose starts are kept in memory once they are asked for in any order
SCAN_WHOLE = 256 * 2**20  # bytes of tokens up to which check_vocabulary and checksum read everything


class TokenFile:
    """The token ids of one .bin, seen as one flat sequence that documents divide.

    "Document" means an entry of ``sizes``: like GPT-NeoX and Megatron-LM, the document index, which could group several
    entries into one document, is checked but not used. Both files are read with ``pread`` rather than through memory
    maps: one exact request per sample on network disks, no resident memory that grows with the run, and an ``OSError``
    where a map would end the process. Nothing is kept of either file, so opening takes constant memory; only where documents
    are asked for in any order, the starts of up to 4 Mi of them are kept from then on (32 MiB at most).

    Attributes: ``path`` (the .bin), ``index_path`` (the .idx, or None), ``dtype``, ``total_tokens``, ``num_documents``.
    """

    def __init__(self, content: AnyBytes, dtype: np.dtype, total_tokens: int, index: Index | None) -> None:
        self.path = content.path
        self.index_path = index.path if index else None
        self.dtype = dtype
        self.total_tokens = total_tokens
        self.num_documents = index.count if index else 1
        self._index = index
        self._bytes = content

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Tokens per document, (num_documents,) int64; a new array of 8 bytes per document."""
        return self.document_sizes(0, self.num_documents)

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """First flat token of each document and the total, (num_documents + 1,) int64; a new array."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.sizes)])

    def document_sizes(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Tokens per document of the documents [first, last), int64."""
        if not 0 <= first <= last <= self.num_documents:
            raise IndexError(f"{self.path} has {self.num_documents} documents, asked for {first} to {last}")
        return self._index.sizes(first, last) if self._index else np.array([self.total_tokens])[first:last]

    def document_start(self, document: int) -> int:
        """Flat position of a document's first token; ``document == num_documents`` gives the total. O(1)."""
        if not 0 <= document <= self.num_documents:
            raise IndexError(f"{self.path} has {self.num_documents} documents, asked for the start of {document}")
        if self._index is None or document == self.num_documents:
            return document * self.total_tokens if self._index is None else self.total_tokens
        return int(self._index.pointers(document, document + 1)[0]) // self.dtype.itemsize

    def document_at(self, token: int) -> int:
        """The document that holds flat token ``token``. O(log documents). Raises ``IndexError`` outside of the file."""
        if not 0 <= token < self.total_tokens:
            raise IndexError(f"{self.path} has {self.total_tokens} tokens, asked for the document of token {token}")
        return bisect_right(range(self.num_documents), token, key=self.document_start) - 1

    def document_starts(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Flat positions of the first tokens of the documents [first, last), as the index says them."""
        if not 0 <= first <= last <= self.num_documents:
            raise IndexError(f"{self.path} has {self.num_documents} documents, asked for the starts of {first} to {last}")
        return self._index.pointers(first, last) // self.dtype.itemsize if self._index else np.zeros(last - first, np.int64)

    def document(self, document: int) -> np.ndarray:
        """Ids of one document, (size,) in the file's dtype. Raises ``IndexError`` outside of the file."""
        if not 0 <= document < self.num_documents:
            raise IndexError(f"{self.path} has {self.num_documents} documents, asked for {document}")
        start = self.document_start(document)
        return self.read(start, int(self.document_sizes(document, document + 1)[0]))

    def read(self, start: int, length: int) -> np.ndarray:
        """Flat tokens [start, start + length), (length,) in the file's dtype, read-only. Raises ``IndexError`` outside of
        the file, ``UserError`` where the file has become shorter since it was opened."""
        if start < 0 or length < 0 or start + length > self.total_tokens:
            raise IndexError(f"{self.path} has {self.total_tokens} tokens, asked for {length} from {start}")
        return self._bytes.read(start * self.dtype.itemsize, length, self.dtype)

    def read_pieces(self, starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> np.ndarray:
        """Flat tokens [start, start + length) of each pair, one after another, (sum of lengths,) in the file's dtype.
        Read-only. Raises as ``read`` does."""
        if starts.size and (
            int(starts.min()) < 0 or int(lengths.min()) < 0 or int((starts + lengths).max()) > self.total_tokens
        ):
            raise IndexError(f"{self.path} has {self.total_tokens} tokens, asked for some outside of them")
        return self._bytes.gather(starts * self.dtype.itemsize, lengths, self.dtype)

    def starts_of(self, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Flat positions of the first tokens of any documents, (n,). Raises ``IndexError`` outside of the file."""
        if documents.size and (int(documents.min()) < 0 or int(documents.max()) >= self.num_documents):
            raise IndexError(f"{self.path} has {self.num_documents} documents, asked for the start of {documents.max()}")
        if self._index is None:
            return np.zeros(len(documents), np.int64)
        if self.num_documents <= KEEP_STARTS:
            return self._starts[documents]
        return self._index.pointers_at(documents) // self.dtype.itemsize

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        return self.document_starts(0, self.num_documents)

    def document_index(self) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """The document index, which groups sequences and which training does not use: (number of the first entry, entries)."""
        if self._index is not None:
            yield from self._index.documents()

    def view(self, first_document: int = 0, last_document: int | None = None) -> TokenView:
        """The documents [first_document, last_document), by default all of them."""
        last = self.num_documents if last_document is None else last_document
        if not 0 <= first_document <= last <= self.num_documents:
            raise IndexError(f"{self.path} has {self.num_documents} documents, asked for {first_document} to {last}")
        start = self.document_start(first_document)
        return TokenView(self, first_document, last, start, self.document_start(last) - start)

    def fingerprint(self) -> str:
        """32 hex digits that depend on the contents alone: not on the path, the time stamps or the document index.

        Hashed are the dtype, the numbers of documents and tokens, the sizes and the tokens; of both the whole up to 4
        MiB, above that 64 evenly spaced blocks of 64 KiB with the first and the last, so that the cost stays constant.
        """
        return self._fingerprint

    def checksum(self) -> str:
        """CRC-32, 8 hex digits, of all sizes and all ids; of the ids of files above 256 MiB only samples, as
        ``check_vocabulary`` takes them. Files of one fingerprint and checksum differ at most outside of these."""
        return self._checksum

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{self.dtype.name} {self.num_documents} {self.total_tokens}".encode())
        if self._index:
            for first, last in blocks(self.num_documents, 2**16 // 4, SAMPLED_BLOCKS):
                digest.update(self._index.sizes(first, last).tobytes())
        for first, last in blocks(self.total_tokens, 2**16 // self.dtype.itemsize, SAMPLED_BLOCKS):
            digest.update(self.read(first, last - first).tobytes())
        return digest.hexdigest()

    @cached_property
    def _checksum(self) -> str:
        found = 0
        for first, last in ranges(self.num_documents, CHECK_WHOLE):
            found = zlib.crc32(self.document_sizes(first, last).tobytes(), found)
        for first, last in self._looked_at():
            found = zlib.crc32(self.read(first, last - first).tobytes(), found)
        return f"{found:08x}"

    def _looked_at(self) -> list[tuple[int, int]]:
        """The ranges of tokens that a start reads: all of them, or samples of a large file."""
        whole = self.total_tokens * self.dtype.itemsize <= SCAN_WHOLE
        block = (2**22 if whole else 2**18) // self.dtype.itemsize
        return ranges(self.total_tokens, block) if whole else blocks(self.total_tokens, block, SAMPLED_BLOCKS)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ``UserError`` naming file, position and id where an id does not lie in [0, vocab_size).

        Everything is read up to 256 MiB of tokens; of larger files 64 evenly spaced blocks of 256 KiB, the first and
        the last among them, so an id outside of the blocks is found only when its batch is read.
        """
        limits = np.iinfo(self.dtype)
        if limits.min >= 0 and limits.max < vocab_size:
            return
        for first, last in self._looked_at():
            ids = self.read(first, last - first)
            if int(ids.max()) >= vocab_size or int(ids.min()) < 0:
                position = int(np.flatnonzero((ids >= vocab_size) | (ids < 0))[0])
                raise UserError(
                    f"{self.path}: token {first + position} is id {int(ids[position])}, outside of the model's "
                    f"vocabulary of {vocab_size} ids: the file was made with another tokenizer, or its ids are not "
                    f"{self.dtype.name}"
                )


@dataclass(frozen=True)
class TokenView:
    """Documents of a file, which are also one row of tokens: here a range of them, which is a range of the file's flat tokens.

    Its documents are counted from ``first_document`` to ``last_document``, as in the file; a view that holds others in between
    (``ListedDocuments``) counts its own from 0.
    """

    file: TokenFile
    first_document: int
    last_document: int
    first_token: int
    num_tokens: int

    @property
    def num_documents(self) -> int:
        return self.last_document - self.first_document

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of the view, (length,) in the file's dtype; ``IndexError`` outside of it."""
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(f"a view of {self.num_tokens} tokens of {self.file.path}, asked for {length} from {start}")
        return self.file.read_pieces(*self.runs(np.array([start]), length)) if length else self.file.read(0, 0)

    def sizes(self) -> npt.NDArray[np.int64]:
        """Tokens per document, (num_documents,) int64; a new array."""
        return self.sizes_between(self.first_document, self.last_document)

    def sizes_between(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Tokens per document of the view's documents [first, last), int64."""
        return self.file.document_sizes(first, last)

    def in_file(self, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The file's numbers of the view's ``documents``, (n,) int64."""
        return documents

    def runs(self, starts: npt.NDArray[np.int64], length: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where ``length`` tokens from each of the view's tokens ``starts``, (n,), on lie in the file: (first tokens, lengths)
        of all pieces, one run after another. ``length`` is at least 1, and no run ends outside of the view."""
        return self.first_token + starts, np.full(len(starts), length)

    @property
    def documents_of(self) -> tuple[int, int]:
        """The range of documents that it was made of: the file's, or those of a list."""
        return self.first_document, self.last_document

    @property
    def span(self) -> tuple[int, int]:
        """The range of the file's flat tokens that holds all of the view."""
        return self.first_token, self.first_token + self.num_tokens


def open_tokens(path: str | Path, *, dtype: str | None = None, vocab_size: int | None = None) -> TokenFile:
    """Open a .bin/.idx pair by its prefix (or either file's name), or a bare .bin by its name.

    Where PREFIX.bin is not there but its shards are (PREFIX-00000-of-00020.bin and so on), they are read as one file.

    ``dtype`` is the type of the ids in a bare .bin (uint16, uint32 or int32); without it, what its manifest says, or else
    uint16 for a ``vocab_size`` of up to 65536 and uint32 above. Raises ``UserError`` for anything but a whole, consistent
    pair: missing files, another format, float data, sizes that don't fit, pointers with gaps between the documents; and
    where a bare file's manifest says otherwise. Every size and pointer is checked; of the ids, see ``check_vocabulary``.
    """
    text = os.fspath(path)
    prefix = text[:-4] if text.endswith((".bin", ".idx")) else text
    bin_path, idx_path = Path(prefix + ".bin"), Path(prefix + ".idx")
    content = open_bin(prefix)
    if content is None:
        raise UserError(f"{bin_path.absolute()} does not exist: give the prefix of a .bin/.idx pair, or a .bin of ids")
    if idx_path.is_file():
        index = open_index(idx_path)
        if dtype is not None and np.dtype(dtype) != index.dtype:
            raise UserError(f"{idx_path} says the ids are {index.dtype.name}, not {dtype}: leave out 'dtype'")
        return TokenFile(content, index.dtype, _check_bin_size(content, index), index)
    if not text.endswith(".bin"):
        raise UserError(f"{idx_path.absolute()} does not exist: if {bin_path.name} is a bare file of ids, write '{bin_path}'")
    return _open_bare(content, dtype, vocab_size)


def _open_bare(content: AnyBytes, dtype: str | None, vocab_size: int | None) -> TokenFile:
    path, size = content.path, content.size
    said = (manifest_of(path) or {}).get("dtype")
    if said in BARE_DTYPES and dtype in BARE_DTYPES and np.dtype(said).itemsize != np.dtype(dtype).itemsize:
        raise UserError(f"{path}: according to its manifest the ids are {said}, 'dtype' is {dtype}: leave out 'dtype'")
    if dtype is None and said in BARE_DTYPES:
        dtype = said
    if dtype is None:
        if vocab_size is None:
            raise UserError(f"{path} has no .idx with the type of its ids: give 'dtype' ({', '.join(BARE_DTYPES)})")
        dtype = "uint16" if vocab_size <= 65536 else "uint32"
    elif dtype not in BARE_DTYPES:
        raise UserError(f"{path}: dtype '{dtype}' is not one of {', '.join(BARE_DTYPES)}")
    kind = np.dtype(dtype).newbyteorder("<")
    if size % kind.itemsize:
        raise UserError(
            f"{path} has {size} bytes, not a multiple of {kind.itemsize}: its ids are not {dtype}, or it is truncated"
        )
    return TokenFile(content, kind, size // kind.itemsize, None)


def _check_bin_size(content: AnyBytes, index: Index) -> int:
    """Tokens in the .bin, after a check of its size against the last pointer."""
    itemsize = index.dtype.itemsize
    n = index.count
    expected = int(index.pointers(n - 1, n)[0]) + int(index.sizes(n - 1, n)[0]) * itemsize if n else 0
    size = content.size
    if size != expected:
        raise UserError(
            f"{content.path} has {size} bytes, its index ends at {expected}: it is "
            f"{'truncated' if size < expected else 'too long'}, or {index.path.name} belongs to another file: make or "
            f"copy both again"
        )
    return expected // itemsize


def dtype_for(vocab_size: int) -> np.dtype:
    """The type in which ids of a vocabulary are written: uint16 for up to 65536 ids, int32 above."""
    return np.dtype("<u2") if vocab_size <= 65536 else np.dtype("<i4")


class TokenFileWriter:
    """Writes PREFIX.bin and PREFIX.idx as GPT-NeoX and Megatron-LM read them, one sequence per document.

    To be used in a ``with`` statement. The files get their names only at a clean exit, complete and synced to the disk;
    after an exception nothing is left. Memory: 4 bytes per document.

    ``dtype`` is uint16 or int32 (``dtype_for``). Raises ``UserError`` if the files exist and ``overwrite`` is False,
    at entry and again before they get their names.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike, *, overwrite: bool = False) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = {name: code for code, name in CODES.items() if name in ("uint16", "int32")}
        if self.dtype.name not in codes:
            raise ValueError(f"token files are written as uint16 or int32, not {self.dtype.name}")
        self._code = codes[self.dtype.name]
        self._limit = int(np.iinfo(self.dtype).max)
        self._overwrite = overwrite
        self._sizes = array("i")
        self.num_tokens = 0

    @property
    def num_documents(self) -> int:
        return len(self._sizes)

    def __enter__(self) -> TokenFileWriter:
        self._refuse_existing()
        self._bin = NewFile(Path(f"{self.prefix}.bin"))
        return self

    def add_document(self, ids: npt.ArrayLike) -> None:
        """Append one document: integers, (t,), may be empty. Raises ``UserError`` for an id the dtype can't hold."""
        tokens = np.asarray(ids)
        if tokens.size == 0:
            tokens = tokens.astype(self.dtype).reshape(-1)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(f"a document is a flat array of integers, not {tokens.dtype} of shape {tokens.shape}")
        if tokens.size > np.iinfo(np.int32).max:
            raise UserError(f"document {self.num_documents} has {tokens.size} tokens, the most is 2147483647: split it")
        limit = self._limit  # uint16 fits into both types, so it needs no look
        if tokens.size and tokens.dtype != np.uint16 and (int(tokens.min()) < 0 or int(tokens.max()) > limit):
            bad = tokens[(tokens < 0) | (tokens > limit)][0]
            raise UserError(f"document {self.num_documents} has id {bad}, {self.dtype.name} goes from 0 to {limit}")
        self._bin.file.write(tokens.astype(self.dtype, copy=False).tobytes())
        self._sizes.append(tokens.size)
        self.num_tokens += tokens.size

    def add_documents(self, ids: npt.NDArray[Any], sizes: npt.NDArray[np.int64]) -> None:
        """Append documents one after another: their ids, (sum of sizes,), checked as ``add_document`` does, and their sizes."""
        if int(sizes.sum()) != ids.size:
            raise ValueError(f"{ids.size} ids for documents of {int(sizes.sum())} tokens")
        before = self.num_documents
        self.add_document(ids)
        del self._sizes[before:]
        self._sizes.extend(sizes.tolist())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        with self._bin:
            if kind is None:
                with NewFile(Path(f"{self.prefix}.idx")) as index:
                    self._write_index(index.file)
                    self._publish(index)

    def _write_index(self, file: IO[bytes]) -> None:
        sizes = np.frombuffer(self._sizes, np.int32) if self._sizes else np.empty(0, np.int32)
        count = len(sizes)
        file.write(HEADER.pack(MAGIC, 1, self._code, count, count + 1))
        file.write(sizes.astype("<i4").tobytes())
        start = 0
        for first, last in ranges(count, 2**20):
            ends = start + np.cumsum(sizes[first:last], dtype=np.int64) * self.dtype.itemsize
            file.write(np.concatenate([[start], ends[:-1]]).astype("<i8").tobytes())
            start = int(ends[-1])
        for first, last in ranges(count + 1, 2**20):
            file.write(np.arange(first, last, dtype="<i8").tobytes())

    def _publish(self, index: NewFile) -> None:
        self._bin.sync()
        index.sync()
        self._refuse_existing()
        # A crash in between leaves a .bin without an index, which is refused, never an old index beside new tokens.
        index.path.unlink(missing_ok=True)
        self._bin.publish()
        index.publish()
        sync_folder(self.prefix.parent)

    def _refuse_existing(self) -> None:
        for suffix in ("bin", "idx"):
            path = Path(f"{self.prefix}.{suffix}")
            if path.exists() and not self._overwrite:
                raise UserError(f"{path} exists: remove it, choose another name, or add --overwrite")
