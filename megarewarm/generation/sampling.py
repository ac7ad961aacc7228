"""The next id of each text out of its logits: by temperature and nucleus (top-p, arXiv 1904.09751), with one random number
for each, which depends on nothing but the text's key and the position.

An id is found by inverting the cumulative distribution, over blocks of ids first, so that one pass over the vocabulary sums
them. A nucleus needs no sort of the vocabulary: few ids hold it, except where a model knows nothing.
"""

from __future__ import annotations

from collections.abc import Callable
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
            return _largest(logits)
        exact = logits.float() if self.temperature == 1 else logits.float() / self.temperature
        numbers = torch.from_numpy(uniform).to(logits.device)[:, None]
        probabilities = F.softmax(exact, -1)
        if self.top_p < 1:
            return _of_nucleus(probabilities, self.top_p, numbers, _LIKELY)
        return _invert(probabilities, numbers)


def _largest(logits: Tensor) -> Tensor:
    """The first id of the largest logit of each row. On a CPU the maxima of blocks take a tenth of argmax over all."""
    block = _blocks(logits, Tensor.amax).argmax(-1, keepdim=True)
    ids, of_block = _block(logits, block, -torch.inf)
    return ids.gather(1, of_block.argmax(-1, keepdim=True))[:, 0]


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
    block, within = _first_above(_blocks(masses, Tensor.sum), numbers)
    ids, of_block = _block(masses, block, 0)
    return ids.gather(1, _first_above(of_block, within)[0])[:, 0]


def _blocks(values: Tensor, of: Callable[..., Tensor]) -> Tensor:
    """(b, v) to (b, blocks): ``of`` each block, of which the last may be shorter."""
    whole = values.shape[1] // _BLOCK * _BLOCK
    found = [of(values[:, :whole].unflatten(1, (-1, _BLOCK)), -1)]
    return torch.cat([*found, of(values[:, whole:], -1, keepdim=True)], 1) if whole < values.shape[1] else found[0]


def _block(values: Tensor, block: Tensor, outside: float) -> tuple[Tensor, Tensor]:
    """(ids, values), both (b, _BLOCK), of the (b, 1) ``block`` of each row; ``outside`` beyond the last id."""
    size = values.shape[1]
    ids = block * _BLOCK + torch.arange(_BLOCK, device=values.device)
    return ids, values.gather(1, ids.clamp(max=size - 1)).masked_fill(ids >= size, outside)


def _first_above(masses: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """((b, 1) the first place up to which more than ``shares`` (b, 1) of the ``masses`` lies, (b, 1) the share of its own mass
    that is left)."""
    above = masses.double().cumsum(-1)
    wanted = torch.minimum(shares * above[:, -1:], above[:, -1:].nextafter(above.new_zeros(1)))  # products are rounded
    place = torch.searchsorted(above, wanted, right=True)
    mass = masses.gather(1, place).double()
    return place, ((wanted - above.gather(1, place) + mass) / mass).clamp_(0, 1)
