"""The contents of a token file for display: the lengths of its documents, its invariants, and differences between two."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from megarewarm.data.files.file_bytes import find_bin
from megarewarm.data.files.token_file import TokenFile, open_tokens
from megarewarm.errors import UserError
from megarewarm.files import sha256

_BLOCK = 2**22  # tokens in memory at a time


@dataclass(frozen=True)
class Lengths:
    """Documents by length: ``bins`` of (shortest, longest, documents), of doubling width; ``empty`` documents apart."""

    empty: int
    median: float
    longest: int
    bins: list[tuple[int, int, int]]


def lengths(file: TokenFile) -> Lengths:
    """The distribution of a file's document lengths, in tokens. Memory: 8 bytes per document."""
    sizes = file.sizes
    filled = sizes[sizes > 0]
    if not filled.size:
        return Lengths(int(sizes.size), 0.0, 0, [])
    powers = np.floor(np.log2(filled)).astype(np.int64)
    counts = np.bincount(powers)
    bins = [(2**i, 2 ** (i + 1) - 1, int(count)) for i, count in enumerate(counts)]
    while bins and not bins[0][2]:
        bins.pop(0)
    return Lengths(int(sizes.size - filled.size), float(np.median(filled)), int(filled.max()), bins)


def verify(file: TokenFile, vocab_size: int | None) -> list[str]:
    """Read the whole file and say what was found to hold. Raises ``UserError`` naming the first place where it does not.

    Opening has checked the header, the sizes of both files, the ends of the document index, every size and every pointer; here
    the whole document index and every id is looked at, and what the manifest beside the files says of them.
    """
    said = [f"{file.path}: {file.total_tokens:,} tokens fill the file exactly"]
    if file.index_path is not None:
        said.append(f"{file.index_path}: {file.num_documents:,} documents follow one another without gaps")
        said.append(_verify_document_index(file))
    largest, highest = -1, vocab_size or 2**32
    for start in range(0, file.total_tokens, _BLOCK):
        block = file.read(start, min(_BLOCK, file.total_tokens - start))
        if (bad := np.flatnonzero((block.astype(np.int64) < 0) | (block >= highest))).size:
            what = f"the vocabulary has {vocab_size} ids" if vocab_size else "ids are counted from 0"
            raise UserError(
                f"{file.path}: token {start + int(bad[0])} is {block[bad[0]]}, {what}: it was made with another tokenizer, or "
                f"is damaged"
            )
        largest = max(largest, int(block.max()))
    if largest >= 0:
        said.append(f"{file.path}: the largest id is {largest:,}" + (f" of {vocab_size:,}" if vocab_size else ""))
    return said + _verify_manifest(file)


def _verify_document_index(file: TokenFile) -> str:
    """The document index counts sequences, from 0 to all of them, never back."""
    before = 0
    for first, entries in file.document_index():
        steps = np.diff(np.concatenate([[before], entries]))
        if (bad := np.flatnonzero((steps < 0) | (entries > file.num_documents))).size:
            raise UserError(
                f"{file.index_path}: entry {first + int(bad[0])} of its document index is {entries[bad[0]]}, expected "
                f"{before if not bad[0] else entries[bad[0] - 1]} to {file.num_documents}: the file is damaged, make it again"
            )
        before = int(entries[-1]) if entries.size else before
    return f"{file.index_path}: its document index goes from 0 to {before:,}"


def _verify_manifest(file: TokenFile) -> list[str]:
    """Counts and checksums of the manifest that preprocessing and merging leave beside the files."""
    manifest = file.path.with_suffix(".json")
    try:
        said = json.loads(manifest.read_bytes())
        counts, sums = (int(said["documents"]), int(said["tokens"])), said["sha256"]
        wanted = {suffix: str(sums[suffix]) for suffix in ("bin", "idx") if suffix == "bin" or file.index_path is not None}
    except FileNotFoundError:
        return [f"{manifest}: is not there, so nothing says which ids the file should hold: they were not compared"]
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{manifest}: is no whole manifest of preprocessing: the files were not compared with it"]
    found = (file.num_documents if file.index_path else counts[0], file.total_tokens)
    if counts != found:
        raise UserError(
            f"{manifest}: says {counts[0]:,} documents and {counts[1]:,} tokens, the files hold {found[0]:,} and {found[1]:,}: "
            f"it belongs to other files"
        )
    for suffix, sha in wanted.items():
        path = file.path.with_suffix(f".{suffix}")
        if sha256(*(find_bin(str(file.path.with_suffix(""))) if suffix == "bin" else [path])) != sha:
            raise UserError(f"{path}: its SHA-256 is not the one in {manifest.name}: it is damaged, make or copy it again")
    return [f"{manifest}: its counts and checksums are those of the files"]


def first_difference(one: str, other: str, dtype: str | None = None) -> str | None:
    """What first differs between two token files, in words; None if they hold the same documents of the same ids. ``dtype``:
    of the ids in bare files."""
    a, b = open_tokens(one, dtype=dtype), open_tokens(other, dtype=dtype)
    if a.num_documents != b.num_documents:
        return f"{a.num_documents:,} documents in {one}, {b.num_documents:,} in {other}"
    for first in range(0, a.num_documents, 2**20):
        last = min(first + 2**20, a.num_documents)
        different = np.flatnonzero(a.document_sizes(first, last) != b.document_sizes(first, last))
        if different.size:
            number = first + int(different[0])
            sizes = [int(file.document_sizes(number, number + 1)[0]) for file in (a, b)]
            return f"document {number:,} has {sizes[0]:,} tokens in {one}, {sizes[1]:,} in {other}"
    for start in range(0, a.total_tokens, _BLOCK):
        count = min(_BLOCK, a.total_tokens - start)
        mine, theirs = a.read(start, count).astype(np.int64), b.read(start, count).astype(np.int64)
        if (bad := np.flatnonzero(mine != theirs)).size:
            place = start + int(bad[0])
            return f"token {place:,} is {mine[bad[0]]} in {one}, {theirs[bad[0]]} in {other}"
    return None
