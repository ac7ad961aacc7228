"""A digest of every document's content: equal documents have equal ones, and ties between documents are broken by them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from megarewarm.selection.desk import Desk
from megarewarm.selection.step import Corpus

Digests = npt.NDArray[np.uint64]


def digests(corpus: Corpus, desk: Desk) -> Digests:
    """(num_documents, 2) uint64: BLAKE2b-128 of each document's ids as little-endian 32-bit numbers, so that the dtype of its
    file makes no difference, without the token that ends it. Mapped from the disk. One pass over everything, once."""
    total = corpus.bytes_of(np.arange(corpus.num_documents))

    def make(first: int) -> Iterator[Digests]:
        done = corpus.bytes_of(np.arange(first))
        for block in corpus.blocks(np.arange(first, corpus.num_documents)):
            ids = block.ids.astype("<u4")
            flat = memoryview(ids.data)
            found = bytearray()
            for start, size in zip(block.starts.tolist(), block.sizes.tolist(), strict=True):
                found += hashlib.blake2b(flat[start : start + size], digest_size=16).digest()
            yield np.frombuffer(found, "<u8").reshape(-1, 2)
            done += block.ids.nbytes
            desk.show("hashing documents", done, total)

    return desk.rows("digests", {"what": "blake2b-128 of 32-bit ids"}, (corpus.num_documents, 2), "<u8", make)


def ranks(found: Digests, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The place of each of ``documents`` among them in the order of their digests, (n,); equal contents in the order given."""
    mine = np.asarray(found[documents])
    order = np.lexsort((mine[:, 1], mine[:, 0]))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return place
