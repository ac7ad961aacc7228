"""The next id of each text out of its logits: by temperature and nucleus (top-p, arXiv 1904.09751), with one random number
for each, which depends on nothing but the text's key and the position.

An id is found by inverting the cumulative distribution, over blocks of ids first, so that one pass over the vocabulary sums
them. A nucleus needs no sort of the vocabulary: few ids hold it, except where a model knows nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from megarewarm.data.order.permutation import derive_key, mix

_BLOCK = 256  # ids that are summed together
_LIKELY = 64  # ids that are looked at first for a nucleus
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

Keys = npt.NDArray[np.uint64]


def text_keys(seed: int, numbers: range) -> Keys:
    """(n,) a key for each of several texts."""
    return np.array([derive_key(seed, number) for number in numbers], np.uint64)


def uniforms(keys: Keys, position: int) -> npt.NDArray[np.float64]:
    """(n,) numbers in [0, 1), of each key's text at ``position``: SplitMix64 seeded with the key."""
    with np.errstate(over="ignore"):
        state = keys + np.uint64(position + 1) * _GOLDEN
        return (mix(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class Sampling:
    """``temperature``: 0 takes the most likely id; ``top_p``: the share of the probability that the likeliest ids which are
    left must hold."""

    temperature: float = 1.0
    top_p: float = 1.0

    def __call__(self, logits: Tensor, uniform: npt.NDArray[np.float64]) -> Tensor:
        """(b, v) logits and (b,) numbers in [0, 1) to (b,) int64 ids."""
        if not self.temperature:
            return logits.argmax(-1)
        exact = logits.float() if self.temperature == 1 else logits.float() / self.temperature
        numbers = torch.from_numpy(uniform).to(logits.device)[:, None]
        probabilities = F.softmax(exact, -1)
        if self.top_p < 1:
            return _of_nucleus(probabilities, self.top_p, numbers, _LIKELY)
        return _invert(probabilities, numbers)


def _of_nucleus(probabilities: Tensor, top_p: float, numbers: Tensor, looked_at: int) -> Tensor:
    """Ids of the smallest sets of likeliest ids that hold ``top_p``: of each row, those before which less than that is held."""
    size = probabilities.shape[1]
    likely, ids = probabilities.topk(min(looked_at, size))
    held = likely.cumsum(-1)
    inside = likely.masked_fill(held - likely >= top_p, 0)
    found = ids.gather(1, _invert(inside, numbers)[:, None])[:, 0]
    if looked_at < size and bool((short := held[:, -1] < top_p).any()):
        found[short] = _of_nucleus(probabilities[short], top_p, numbers[short], 8 * looked_at)
    return found


def _invert(masses: Tensor, numbers: Tensor) -> Tensor:
    """(b, v) masses, which need not sum to 1, and (b, 1) float64 numbers to (b,) ids: the first whose cumulative share exceeds
    the number."""
    size = masses.shape[1]
    whole = size // _BLOCK * _BLOCK
    sums = [masses[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1), masses[:, whole:].sum(-1, keepdim=True)]
    block, within = _first_above(torch.cat(sums, 1), numbers)
    ids = block * _BLOCK + torch.arange(_BLOCK, device=masses.device)
    of_block = masses.gather(1, ids.clamp(max=size - 1)).masked_fill(ids >= size, 0)
    return (block * _BLOCK + _first_above(of_block, within)[0])[:, 0]


def _first_above(masses: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """((b, 1) the first place up to which more than ``shares`` (b, 1) of the ``masses`` lies, (b, 1) the share of its own mass
    that is left)."""
    above = masses.double().cumsum(-1)
    wanted = torch.minimum(shares * above[:, -1:], above[:, -1:].nextafter(above.new_zeros(1)))  # products are rounded
    place = torch.searchsorted(above, wanted, right=True)
    mass = masses.gather(1, place).double()
    return place, ((wanted - above.gather(1, place) + mass) / mass).clamp_(0, 1)
