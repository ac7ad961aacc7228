"""Shares of checkpoints that stand for a decay: against the decayed increments, and against the schedule ``wsd`` itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarewarm.schedules.curves import WSD_DECAYS
from megarewarm.schedules.merging import decay_factors, decay_shares, shares_of
from megarewarm.schedules.schedule import Schedule

SHAPES = st.sampled_from(sorted(WSD_DECAYS))
STEPS = st.lists(st.integers(0, 400), min_size=2, max_size=12, unique=True).map(sorted)


@given(SHAPES, STEPS, st.integers(0, 2**31))
def test_the_average_is_the_sum_of_decayed_increments(shape: str, steps: list[int], seed: int) -> None:
    points = np.random.default_rng(seed).normal(size=(len(steps), 5))
    factors, shares = decay_factors(shape, steps), decay_shares(shape, steps)
    decayed = points[0] + factors @ np.diff(points, axis=0)
    assert np.abs(shares @ points - decayed).max() < 1e-14
    assert shares.sum() == pytest.approx(1, abs=1e-14) and shares.min() > -1e-15
    assert factors[0] <= 1 and factors[-1] >= 0 and (np.diff(factors) < 0).all()


@given(SHAPES, st.integers(0, 50), st.integers(2, 40), st.integers(0, 2**31))
def test_where_gradients_don_t_notice_it_is_the_run_with_that_decay(shape: str, stable: int, decay: int, seed: int) -> None:
    """Plain gradient descent along the same gradients: at a constant rate with a checkpoint at every step, and by ``wsd``."""
    total = stable + decay
    schedule = Schedule("wsd", 0.3, 0.0, float(total), min_lr=0.0, decay=float(decay), decay_shape=shape)
    gradients = np.random.default_rng(seed).normal(size=(total, 3))
    constant = np.vstack([np.zeros((1, 3)), -np.cumsum(0.3 * gradients, axis=0)])
    by_schedule = -sum(schedule.lr(n) * gradients[n] for n in range(total))
    average = decay_shares(shape, range(stable, total + 1)) @ constant[stable:]
    assert np.allclose(average, by_schedule, rtol=0, atol=1e-13)


def test_numbers_by_hand() -> None:
    """k + 1 checkpoints of equal shares are w_j = 1 - j / (k + 1); a linear decay halves the shares of first and last."""
    assert shares_of(np.array([0.75, 0.5, 0.25])) == pytest.approx([0.25] * 4)
    assert decay_shares("linear", [0, 1, 2, 3, 4]) == pytest.approx([0, 0.25, 0.25, 0.25, 0.25])
    long = decay_shares("linear", [0, 10**6, 2 * 10**6])
    assert long == pytest.approx([0.25, 0.5, 0.25], abs=1e-6)
    assert decay_factors("minus_sqrt", [7, 8, 11]) == pytest.approx([1, 1 - np.mean(np.sqrt([1 / 4, 2 / 4, 3 / 4]))])


@pytest.mark.parametrize("steps", [[4], [4, 4], [5, 4]])
def test_steps_that_do_not_ascend_are_refused(steps: list[int]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        decay_factors("linear", steps)
