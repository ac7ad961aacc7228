"""Blending of sources by the greedy rule of GPT-NeoX and Megatron-LM: a sample comes from the source furthest behind.

At position p the source with the largest ``w_i * max(p, 1) - c_i`` is taken, the lowest i at a tie, where w_i is its
share and c_i how many samples it has given so far.

With exact shares w_i = n_i / D the rule is periodic. The deficits d_i = w_i p - c_i sum to 0, so the largest is at
least 0 and stays above -1 after its source was taken: always d_i > -1. At p = D all deficits are integers above -1 that
sum to 0, so they are 0, and so again after every D samples. Only the first period can differ from the others, because
p = 0 counts as 1. ``Blend`` stores two periods and knows the source of any position of an endless run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megarewarm.config.data import Order
from megarewarm.errors import UserError

MAX_PERIOD = 2**20

_LANES = 4096  # blocks that take their steps together
_WARMUP = 128  # steps before its block in which a lane finds into the true sequence
_SERIAL = 2**14  # positions below which the plain loop is faster
_FEW = 48  # sources up to which the plain loop is faster than numpy's over the sources
_MANY = 512  # sources from which on numpy's loop over them is faster than blocks side by side, which take memory as well


class AnyBlend(Protocol):
    """The source, and its sample, at each position. A source's samples come in their order, from 0 on."""

    def locate(self, positions: npt.ArrayLike) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
        """(source, index within source) of positions >= 0, each of the shape of ``positions``."""

    def counts(self, positions: int) -> npt.NDArray[np.int64]:
        """How many of the first ``positions`` samples each source gives, (sources,)."""


def normalised(weights: Sequence[float], order: Order) -> list[float]:
    """``weights`` over their sum, in float64, summed as the trainer of ``order`` does, because the last bits decide at ties.

    Megatron-LM takes numpy's sum, which adds in pairs from 8 numbers on; GPT-NeoX adds from left to right, and so does
    megarewarm. Both divide again by numpy's sum before they blend: ``greedy_blend`` does.
    """
    if order == "megatron":
        values = np.array(weights, np.float64)
        return (values / values.sum()).tolist()
    total = 0.0
    for weight in weights:  # not sum(), which compensates for rounding from Python 3.12 on
        total += weight
    return [weight / total for weight in weights]


def greedy_blend(weights: Sequence[float], size: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
    """The first ``size`` picks of the rule in float64, bit for bit those of GPT-NeoX and Megatron-LM.

    Returns (source, index within source), each (size,). ``weights`` are shares that the trainer has ``normalised`` already;
    as in both trainers, they are divided by numpy's sum of them again.
    """
    shares = np.array(weights, np.float64)
    source = _greedy(shares / shares.sum(), 1, size)
    return source, _index_within(source, len(shares))


class GreedyTable:
    """``greedy_blend`` of ``weights`` for ``size`` positions, as a table."""

    def __init__(self, weights: Sequence[float], size: int) -> None:
        self._source, self._index = greedy_blend(weights, size)
        self._sources = len(weights)

    def locate(self, positions: npt.ArrayLike) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
        """(source, index within source) of positions below the size, each of the shape of ``positions``."""
        where = np.asarray(positions, np.int64)
        return self._source[where], self._index[where]

    def counts(self, positions: int) -> npt.NDArray[np.int64]:
        """How many of the first ``positions`` samples each source gives, (sources,)."""
        return np.bincount(self._source[:positions], minlength=self._sources)


class Blend:
    """An endless greedy blend of ``weights`` (> 0, relative), of which any position is found in O(1).

    The shares are fractions of a common denominator ``period``: exact where the decimal weights allow one of up to
    2**20, else rounded to 2**20-ths by largest remainder. Memory and time to build are bound by the period, whatever
    the length of the run, and by ``size``, if no position from there on will be asked for.
    Raises ``UserError`` for a share that rounds to nothing.
    """

    def __init__(self, weights: Sequence[float], size: int | None = None) -> None:
        self.numerators = _numerators(weights)
        self.period = int(self.numerators.sum())
        wanted = 2 * self.period if size is None else min(size, 2 * self.period)
        self._source = _greedy(self.numerators, self.period, wanted)
        parts = np.split(self._source, [self.period]) if wanted > self.period else [self._source]
        self._index = np.concatenate([_index_within(part, len(self.numerators)) for part in parts])

    def locate(self, positions: npt.ArrayLike) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
        """(source, index within source) of positions >= 0, each of the shape of ``positions``."""
        where = np.asarray(positions, np.int64)
        if where.size and int(where.min()) < 0:
            raise IndexError("a blend has no negative positions")
        rounds, place = np.divmod(where, self.period)
        place += np.where(rounds > 0, self.period, 0)
        source = self._source[place]
        return source, self._index[place] + rounds * self.numerators[source]

    def counts(self, positions: int) -> npt.NDArray[np.int64]:
        """How many of the first ``positions`` samples each source gives, (sources,)."""
        rounds, rest = divmod(positions, self.period)
        first = self.period if rounds else 0
        part = np.bincount(self._source[first : first + rest], minlength=len(self.numerators))
        return rounds * self.numerators + part


def _numerators(weights: Sequence[float]) -> npt.NDArray[np.int64]:
    """Whole numbers n_i in the proportion of the weights, with a sum D of at most 2**20."""
    exact = [Fraction(repr(float(weight))) for weight in weights]  # 0.1 means 1/10, not the nearest binary fraction
    if not exact or min(exact) <= 0:
        raise UserError(f"weights of a blend must be above 0, not {list(weights)}")
    total = sum(exact)
    shares = [weight / total for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= MAX_PERIOD:
        return np.array([int(share * period) for share in shares], np.int64)
    scaled = [share * MAX_PERIOD for share in shares]
    whole = np.array([int(value) for value in scaled], np.int64)
    by_remainder = sorted(range(len(scaled)), key=lambda i: (int(whole[i]) - scaled[i], i))
    whole[by_remainder[: MAX_PERIOD - int(whole.sum())]] += 1
    if whole.min() == 0:
        i = int(whole.argmin())
        raise UserError(f"weight {weights[i]:g} is less than one sample in {MAX_PERIOD}: raise it or remove the source")
    return whole // np.gcd.reduce(whole)


def _index_within(source: npt.NDArray[np.int16], sources: int) -> npt.NDArray[np.int64]:
    """For each pick, how many picks of the same source come before it."""
    order = np.argsort(source, kind="stable")
    counts = np.bincount(source, minlength=sources)
    index = np.empty(len(source), np.int64)
    index[order] = np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)
    return index


def _greedy(shares: np.ndarray, unit: int, size: int) -> npt.NDArray[np.int16]:
    """``size`` picks of the rule argmax_i shares[i] * max(p, 1) - unit * c_i, in the arithmetic of ``shares``.

    The plain loop would take minutes for a long run, so blocks of it are computed side by side. A block needs the
    counts at its start. Since the rule corrects itself, a lane that starts a little earlier from counts near ``w * p``
    has almost always fallen in with the true sequence by then. Whether it has is checked against where the block before
    it ended; where not, the plain loop continues until the two agree. The result is always that of the plain loop.
    """
    if len(shares) > 2**15:
        raise UserError(f"a blend of {len(shares)} sources: at most {2**15} are possible")
    out = np.zeros(size, np.int16)
    counts = np.zeros(len(shares), np.int64)
    if len(shares) == 1:
        return out
    done = min(size, _SERIAL) if len(shares) <= _MANY else size
    _serial(shares, unit, counts, 0, out[:done])
    while size - done >= _SERIAL:
        length = min(1024, (size - done) // 32)
        lanes = min(_LANES, (size - done) // length)
        starts = done + length * np.arange(lanes)
        picks, guesses = _side_by_side(shares, unit, starts, length)
        for lane in range(lanes):
            block = picks[lane]
            if not np.array_equal(counts, guesses[lane]):
                _rejoin(shares, unit, counts.copy(), guesses[lane], int(starts[lane]), block)
            counts += np.bincount(block, minlength=len(shares))
        out[done : done + lanes * length] = picks.reshape(-1)
        done += lanes * length
    _serial(shares, unit, counts, done, out[done:])
    return out


def _serial(shares: np.ndarray, unit: int, counts: np.ndarray, start: int, out: np.ndarray) -> None:
    """The rule as it is written, from position ``start`` on; ``counts`` is brought forward."""
    if len(shares) > _FEW:
        gained, given = np.empty_like(shares), np.empty_like(shares)
        for step in range(len(out)):
            np.multiply(shares, max(start + step, 1), out=gained)
            np.multiply(counts, unit, out=given)
            best = int(np.argmax(np.subtract(gained, given, out=gained)))
            counts[best] += 1
            out[step] = best
        return
    weights, taken = shares.tolist(), counts.tolist()
    sources = range(1, len(weights))
    for step in range(len(out)):
        p = max(start + step, 1)
        best, most = 0, weights[0] * p - unit * taken[0]
        for i in sources:
            deficit = weights[i] * p - unit * taken[i]
            if deficit > most:
                best, most = i, deficit
        taken[best] += 1
        out[step] = best
    counts[:] = taken


def _side_by_side(
    shares: np.ndarray, unit: int, starts: npt.NDArray[np.int64], length: int
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
    """Picks (lanes, length) of blocks that begin at ``starts``, and the counts (lanes, sources) guessed for these."""
    lanes = np.arange(len(starts))
    position = starts - _WARMUP
    ideal = shares * position[:, None] / unit
    counts = np.floor(ideal).astype(np.int64)
    missing = position - counts.sum(axis=1)
    rank = np.argsort(np.argsort(counts - ideal, axis=1, kind="stable"), axis=1)
    counts += rank < missing[:, None]
    picks = np.empty((len(starts), length), np.int16)
    guesses = counts
    for step in range(-_WARMUP, length):
        if step == 0:
            guesses = counts.copy()
        best = np.argmax(shares * position[:, None] - unit * counts, axis=1)
        counts[lanes, best] += 1
        position = position + 1
        if step >= 0:
            picks[:, step] = best
    return picks, guesses


def _rejoin(
    shares: np.ndarray, unit: int, counts: np.ndarray, guess: np.ndarray, start: int, block: npt.NDArray[np.int16]
) -> None:
    """Correct a block that was computed from ``guess`` instead of ``counts``, up to where both have the same counts."""
    ahead = guess.copy()
    for first in range(0, len(block), 64):
        piece = block[first : first + 64]
        ahead += np.bincount(piece, minlength=len(shares))
        _serial(shares, unit, counts, start + first, piece)
        if np.array_equal(counts, ahead):
            return
