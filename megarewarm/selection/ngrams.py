"""Hashes of the n-grams of token ids of many documents at once."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

_BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2**64
_TABLE = 2**16  # ids whose mixed values are kept


def ngrams(ids: npt.NDArray[Any], starts: Numbers, sizes: Numbers, n: int) -> tuple[Hashes, Numbers]:
    """(hashes of all n-grams, (g,) uint64; bounds, (documents + 1,): those of document i are [bounds[i], bounds[i + 1])).

    Document i is ``ids[starts[i] : starts[i] + sizes[i]]``. One of fewer than ``n`` tokens has a single gram, all of it; an
    empty one has none. A gram is the polynomial of its mixed ids modulo 2**64, from prefix sums, mixed with its length: equal
    grams have equal hashes in any file, different ones do with a chance of about 2**-64.
    """
    counts = np.where(sizes >= n, sizes - n + 1, (sizes > 0).astype(np.int64))
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    begins = np.arange(int(bounds[-1])) + np.repeat(starts - bounds[:-1], counts)
    lengths = np.repeat(np.minimum(sizes, n), counts)
    powers, inverses = _powers(1 << max(1, int(ids.size).bit_length()))
    sums = np.zeros(ids.size + 1, np.uint64)
    np.cumsum(_mixed_ids(ids) * powers[: ids.size], out=sums[1:])
    grams = (sums[begins + lengths] - sums[begins]) * inverses[begins]
    return _mixed(grams + lengths.astype(np.uint64) * np.uint64(_BASE)), bounds


def _mixed(values: Hashes) -> Hashes:
    """splitmix64's finaliser: a bijection of 64-bit numbers whose outputs look independent."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=1)
def _table() -> Hashes:
    return _mixed(np.arange(1, _TABLE + 1, dtype=np.uint64) * np.uint64(_BASE))


def _mixed_ids(ids: npt.NDArray[Any]) -> Hashes:
    if ids.dtype.itemsize <= 2 or (ids.size and int(ids.min()) >= 0 and int(ids.max()) < _TABLE):
        return _table()[ids.astype(np.intp)]
    return _mixed((ids.astype(np.uint64) + np.uint64(1)) * np.uint64(_BASE))


@lru_cache(maxsize=32)  # a power of two of entries each, so all take twice the memory of the largest
def _powers(count: int) -> tuple[Hashes, Hashes]:
    """The powers 0 to ``count`` - 1 of the base, and of its inverse."""
    inverse = pow(_BASE, -1, 2**64)
    return tuple(  # type: ignore[return-value]
        np.concatenate([np.ones(1, np.uint64), np.cumprod(np.full(count - 1, base, np.uint64))]) for base in (_BASE, inverse)
    )
