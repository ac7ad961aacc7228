"""A decay of the learning rate by averaging: which weights of checkpoints stand for which decay (WSM, arXiv 2507.17634).

Between checkpoints theta_0, ..., theta_k a run makes the increments d_j = theta_j - theta_(j-1). A decay that scales them by
w_1 >= ... >= w_k reaches, as long as gradients don't notice, theta_0 + sum_j w_j d_j. The average with the shares
c_0 = 1 - w_1, c_j = w_j - w_(j+1), c_k = w_k is the same point.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from megarewarm.schedules.curves import WSD_DECAYS, Values, progress
from megarewarm.schedules.schedule import Schedule


def decay_factors(shape: str, steps: Sequence[int]) -> Values:
    """w_1 to w_k, float64: the mean of the decay ``shape`` (of ``WSD_DECAYS``, from 1 to 0 over all of ``steps``) over the
    steps of each increment. ``steps``: those of the k + 1 checkpoints, ascending."""
    if len(steps) < 2 or any(later <= earlier for earlier, later in itertools.pairwise(steps)):
        raise ValueError(f"steps {list(steps)}: expected two or more, ascending")
    first, last = steps[0], steps[-1]
    rates = WSD_DECAYS[shape](progress(np.arange(first, last), first, last - first), 1.0, 0.0)
    ends = np.asarray(steps) - first
    return np.add.reduceat(rates, ends[:-1]) / np.diff(ends)


def shares_of(factors: Values) -> Values:
    """c_0 to c_k from w_1 to w_k. They add up to 1."""
    return -np.diff(np.concatenate([[1.0], factors, [0.0]]))


def within(length: float, steps: Sequence[int]) -> list[int]:
    """Those of ascending ``steps`` in the last ``length`` steps: steps are rounded, shares of a run are not."""
    return [step for step in steps if steps[-1] - step <= length + 0.5]


def decay_shares(shape: str, steps: Sequence[int]) -> Values:
    """The share of each checkpoint in an average that stands for a decay over ``steps``."""
    return shares_of(decay_factors(shape, steps))


def note_on_rates(schedule: Schedule, first: int, last: int) -> str:
    """A note where the rate is no constant between two positions of a schedule; empty where it is."""
    rates = schedule.values(np.arange(first, last))
    if np.allclose(rates, rates[0], rtol=1e-6):
        return ""
    return (
        f"the learning rate goes from {rates[0]:.4g} to {rates[-1]:.4g} within the window: the average adds its decay to "
        f"that; only a constant rate makes it equal to a decay of this shape"
    )
