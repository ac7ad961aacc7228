"""Two numbers that sum up the learning rates of a run so far, pure functions of the schedule.

Tissue et al., arXiv 2408.11029 ("Scaling law with learning rate annealing"), predict the loss after every step from them:
L = L0 + A S1^-a - C S2. The law of continual pre-training (arXiv 2505.07796) is built from the same two.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from megarewarm.schedules.curves import Values

MEMORY = 0.999
"""Lambda in arXiv 2408.11029: the share of the annealing momentum that remains after a step."""


class LearningRateSums(NamedTuple):
    """After each of n steps, float64 (n,). ``total``: S1, the sum of the learning rates. ``area``: S2, the annealing area."""

    total: Values
    area: Values


def learning_rate_sums(rates: ArrayLike, memory: float = MEMORY) -> LearningRateSums:
    """S1 and S2 of steps that used ``rates`` (n,), in order.

    S1 is the sum of the rates up to the step. S2 = sum_i m_i with m_i = memory m_{i-1} + (lr_{i-1} - lr_i) and m_0 = 0, the
    rate before the first step taken as the first one's own: what the rate fell counts for some 1 / (1 - memory) steps, and
    a re-warming counts negatively. Raises ValueError unless ``rates`` has one dimension and ``memory`` lies in [0, 1).
    """
    rates = np.asarray(rates, dtype=np.float64)
    if rates.ndim != 1 or not 0 <= memory < 1:
        raise ValueError(f"need rates (n,) and a memory in [0, 1), got {rates.shape} and {memory:g}")
    falls = np.zeros_like(rates)
    falls[1:] = rates[:-1] - rates[1:]
    momenta = list(accumulate(falls.tolist(), lambda momentum, fall: memory * momentum + fall))
    return LearningRateSums(np.cumsum(rates), np.cumsum(np.asarray(momenta, dtype=np.float64)))
