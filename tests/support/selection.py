"""Token files whose documents end with an end-of-document token, as preprocessing leaves them, and near copies of documents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megarewarm.data.files.token_file import TokenFileWriter, open_tokens

END = 0


def write_documents(prefix: Path, documents: Sequence[np.ndarray | list[int]], dtype: type = np.uint16) -> str:
    """The documents, each with ``END`` after it, and a manifest that says so. Returns the prefix."""
    with TokenFileWriter(prefix, dtype) as writer:
        for ids in documents:
            writer.add_document(np.append(np.asarray(ids, np.int64), END))
    said = {"documents": writer.num_documents, "tokens": writer.num_tokens, "dtype": writer.dtype.name}
    Path(f"{prefix}.json").write_text(json.dumps({**said, "eod": {"id": END, "token": "<|endoftext|>"}}))
    return str(prefix)


def contents(prefix: Path | str) -> list[bytes]:
    """The documents of a token file as bytes, with what ends them."""
    file = open_tokens(prefix)
    return [file.document(i).tobytes() for i in range(file.num_documents)]


def text(random: np.random.Generator, length: int = 200) -> np.ndarray:
    """A document like no other."""
    return random.integers(1, 30_000, length)


def changed(ids: np.ndarray, random: np.random.Generator, places: int) -> np.ndarray:
    """A copy with other ids at some places."""
    copy = ids.copy()
    copy[random.choice(len(ids), places, replace=False)] = random.integers(30_000, 60_000, places)
    return copy


def gram_set(ids: np.ndarray | list[int], n: int) -> set[tuple[int, ...]]:
    """The set of n-grams, the whole of a shorter document."""
    row = [int(token) for token in ids]
    return {tuple(row[i : i + n]) for i in range(max(1, len(row) - n + 1))} if row else set()


def jaccard(one: np.ndarray | list[int], other: np.ndarray | list[int], n: int) -> float:
    """By the definition."""
    a, b = gram_set(one, n), gram_set(other, n)
    return len(a & b) / len(a | b) if a | b else 0.0
