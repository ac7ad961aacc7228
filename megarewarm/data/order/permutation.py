"""A keyed pseudo-random permutation of range(n) that is computed, not stored.

A Feistel network over pairs (left, right) in Z_a x Z_a with a = ceil(sqrt(n)): each round maps a pair to
(right, left + F(right) mod a), which is invertible for any F, so the whole is a permutation of range(a^2). Values that
land in [n, a^2), at most 2a of them, are sent through again until they fall below n (cycle walking), which leaves a
permutation of range(n). (Black and Rogaway 2002, "Ciphers with arbitrary finite domains": generalised Feistel.)
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

ROUNDS = 8
MAX_SIZE = 2**60

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def derive_key(*parts: int) -> int:
    """A 64-bit key from integers of any size, such as (seed, source, epoch); differs wherever any of them does."""
    text = ",".join(str(int(part)) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Permutation:
    """A permutation of range(n), 1 <= n <= 2**60, chosen by a 64-bit key. Constant memory, any element at once."""

    def __init__(self, n: int, key: int) -> None:
        if not 1 <= n <= MAX_SIZE:
            raise ValueError(f"a permutation of {n} elements: expected 1 to 2**60")
        self.n = n
        root = math.isqrt(n - 1) + 1  # ceil(sqrt(n))
        self._side = np.uint64(root)
        self._round_keys = mix(np.array([(key + _GOLDEN * (i + 1)) & _MASK for i in range(ROUNDS)], np.uint64))

    def __call__(self, indices: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Images of the indices, int64 of the same shape. Raises ``IndexError`` for an index outside of range(n)."""
        values = np.asarray(indices, np.int64)
        if values.size and (int(values.min()) < 0 or int(values.max()) >= self.n):
            raise IndexError(f"index outside of range({self.n})")
        images = self._network(values.astype(np.uint64).reshape(-1))
        limit = np.uint64(self.n)
        while (outside := np.flatnonzero(images >= limit)).size:
            images[outside] = self._network(images[outside])
        return images.astype(np.int64).reshape(values.shape)

    def _network(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        side = self._side
        left, right = values // side, values % side
        for key in self._round_keys:
            left, right = right, (left + mix(right ^ key) % side) % side
        return left * side + right


def mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The 64-bit finaliser of SplitMix64 (Steele, Lea and Flood 2014; constants: Stafford's variant 13)."""
    mixed = values ^ (values >> np.uint64(30))
    mixed = mixed * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
