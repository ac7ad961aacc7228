"""Checkpoints in which revisions up to 98ed75b misplaced rows of the vocabulary, recognised by the offsets in their index.

With tensor ranks that don't share the vocabulary evenly, and sharding, each rank saved its shard of the *padded* rows, under
the offset that torch's rule gives a shard of the rows *without* padding. The files hold every row; only the index is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from megarewarm.model.parameters import EMBEDDING, HEAD

_MOST_RANKS = 1024  # that the layout is thought to have had


@dataclass(frozen=True)
class Misplaced:
    """``first`` to ``last``: the rows that the index places wrongly. ``unread``: those that the old revision left as they were
    when it loaded such a checkpoint in the layout that wrote it."""

    first: int
    last: int
    unread: tuple[int, ...]


def true_places(rows: int, named: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int]], Misplaced] | None:
    """The places, (first row, number of rows), that belong to the ``named`` ones of a tensor of ``rows`` rows, in their order,
    if these are those of a layout that misplaced rows; else None.

    No right layout names such places (tried for vocabularies to 700 and the usual ones, up to 16 tensor ranks x 64 shards).
    """
    named = list(named)
    if not 3 <= len(named) <= _MOST_RANKS or named != sorted(named) or len({count for _, count in named[:-1]}) == 1:
        return None  # all but the last are equal: torch's rule applied once
    shard = named[0][1]  # of the first tensor rank, whose rows are all its own
    if shard < 2:
        return None
    for tensor in range(2, min(_MOST_RANKS, len(named)) + 1):
        padded = -(-rows // tensor)
        fewest, most = -(-padded // shard), min(_MOST_RANKS, -(-padded // (shard - 1)) - 1)
        for shards in range(max(2, fewest), most + 1):
            right = _matched(rows, named, tensor, shards, shard)
            if right is not None and any(a[0] != b[0] for a, b in zip(named, right, strict=True)):
                return right, _rows(named, right)
    return None


def _matched(rows: int, named: Sequence[tuple[int, int]], tensor: int, shards: int, shard: int) -> list[tuple[int, int]] | None:
    """The true offsets if ``tensor`` x ``shards`` ranks wrote these, the first of them with ``shard`` rows."""
    padded, right = -(-rows // tensor), list[tuple[int, int]]()
    for rank in range(tensor):
        begin = min(rank * padded, rows)
        own = min(padded, rows - begin)
        size = -(-own // shards)
        for number in range(shards):
            place = min(number * size, own)
            if place == own:
                break
            if len(right) == len(named) or named[len(right)] != (begin + place, min(size, own - place)):
                return None
            at = min(number * shard, own)
            right.append((begin + at, min(shard, own - at)))
    return right if len(right) == len(named) else None


def _rows(wrong: Sequence[tuple[int, int]], right: Sequence[tuple[int, int]]) -> Misplaced:
    parted = [(a, b) for a, b in zip(wrong, right, strict=True) if a[0] != b[0]]
    unread = [row for a, b in zip(wrong, right, strict=True) for row in range(b[0] + min(a[1], b[1]), b[0] + b[1])]
    return Misplaced(min(a[0] for a, _ in parted), max(a[0] + a[1] for a, _ in parted) - 1, tuple(unread))


def mend(metadata: Metadata) -> Misplaced | None:
    """Write the true offsets into ``metadata`` and return the misplaced rows, None without any."""
    found: Misplaced | None = None
    for name, entry in metadata.state_dict_metadata.items():
        if not name.endswith((EMBEDDING, HEAD)) or not isinstance(entry, TensorStorageMetadata) or len(entry.size) != 2:
            continue
        chunks = sorted(entry.chunks, key=lambda chunk: chunk.offsets)
        if any(chunk.sizes[1] != entry.size[1] for chunk in chunks):
            continue
        mended = true_places(entry.size[0], [(chunk.offsets[0], chunk.sizes[0]) for chunk in chunks])
        if mended is None:
            continue
        places, found = mended
        infos = [metadata.storage_data.pop(MetadataIndex(name, chunk.offsets)) for chunk in chunks]
        entry.chunks.clear()
        for (first, count), info in zip(places, infos, strict=True):
            if count == 0:
                continue
            chunk = ChunkStorageMetadata(torch.Size((first, 0)), torch.Size((count, entry.size[1])))
            entry.chunks.append(chunk)
            metadata.storage_data[MetadataIndex(name, chunk.offsets)] = info
    return found
