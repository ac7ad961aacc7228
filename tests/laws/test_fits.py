"""Laws fitted to losses that a known law made: what is predicted of runs that were left out, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.laws import annealing, replay
from megarewarm.laws.annealing import Choice, _sums, fit_annealing
from megarewarm.laws.arms import Family, Trained
from megarewarm.laws.fitting import Bounds, HeldOut, Trial, fit
from megarewarm.laws.replay import ReplayLaw, fit_replay, largest_new_share

STEPS = 120
BEFORE = 2e-4  # the checkpoint's last rate
SUM_BEFORE = 0.6


def cosine(peak: float, warmup: int, low: float | None = None) -> np.ndarray:
    n = np.arange(STEPS)
    low = peak / 10 if low is None else low
    decayed = low + (peak - low) / 2 * (1 + np.cos(np.pi * np.clip((n - warmup) / (STEPS - warmup), 0, 1)))
    return np.where(n < warmup, peak * (n + 1) / max(warmup, 1), decayed)


def areas(rates: np.ndarray, memory: float, before: float) -> np.ndarray:
    """S2 after each step as the double sum that defines it."""
    falls = -np.diff(np.concatenate([[before], rates]))
    return np.array([sum(falls[j] * memory ** (i - j) for i in range(n + 1) for j in range(i + 1)) for n in range(len(rates))])


def true_change(rates: np.ndarray, shift: float, memory: float = 0.9) -> np.ndarray:
    total = np.cumsum(rates)
    learned = 0.8 * ((SUM_BEFORE + total) ** -0.4 - SUM_BEFORE**-0.4)
    return learned - 35.0 * areas(rates, memory, BEFORE) + shift * (1 - (1 + 60 * total) ** -0.5)


def trained(arm: str, rates: np.ndarray, shift: float, noise: float, seed: int = 1) -> Trained:
    steps = np.array([0, 2, 5, *range(10, STEPS + 1, 10)], dtype=np.float64)
    change = np.concatenate([[0.0], true_change(rates, shift)])[steps.astype(int)]
    generator = np.random.default_rng([seed, *arm.encode()])
    losses = 3.0 + 0.01 * seed + change + generator.normal(0, noise, len(steps)) * (steps > 0)
    return Trained(f"{arm}.s{seed}", arm, seed, {}, {}, rates, 2048.0, {"upstream": (steps, losses)}, BEFORE, SUM_BEFORE)


ARMS = {
    "constant": np.full(STEPS, BEFORE), "low": cosine(5e-4, 2), "middle": cosine(1e-3, 2), "middle_slow": cosine(1e-3, 20),
    "high": cosine(2e-3, 2),
}  # fmt: skip


@pytest.mark.parametrize("shift", [0.9, -0.9])
def test_schedules_that_were_not_tried_are_predicted(shift: float) -> None:
    family = Family([trained(arm, rates, shift, 0.003) for arm, rates in ARMS.items()])
    law = fit_annealing(family, "upstream")
    assert law is not None and law.trial.holds
    assert law.choice == Choice(0.9, own_rate=False)
    assert law.trial.error < 0.25 * law.trial.error_of_mean
    for rates in (cosine(1.4e-3, 8), cosine(7e-4, 2, low=7e-4)):
        predicted = law.change(rates, BEFORE, SUM_BEFORE)
        assert abs(predicted[-1] - true_change(rates, shift)[-1]) < min(law.trial.band, 0.03)
    assert law.parameters[3] / law.area_unit == pytest.approx(35.0, rel=0.15)  # C, which the fall of the rate shows alone


def test_seeds_of_an_arm_are_left_out_together() -> None:
    runs = [trained(arm, rates, 0.9, 0.003, seed) for arm, rates in list(ARMS.items())[:4] for seed in (1, 2)]
    law = fit_annealing(Family(runs), "upstream")
    assert law is not None and [arm.arm for arm in law.trial.arms] == list(ARMS)[:4]
    for arm in law.trial.arms:
        assert arm.measured == pytest.approx(np.mean([run.final("upstream") for run in runs if run.arm == arm.arm]))


def test_too_few_schedules() -> None:
    runs = [trained(arm, rates, 0.9, 0.003) for arm, rates in list(ARMS.items())[:3]]
    again = dataclasses.replace(runs[0], name="again", arm="again")  # the same rates under another name are no fourth
    assert fit_annealing(Family([*runs, again]), "upstream") is None


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0, 1e-2), min_size=1, max_size=25), st.floats(0, 1e-2), st.sampled_from([0.0, 0.9, 0.999]), st.booleans()
)
def test_sums_are_those_of_the_definition(rates: list[float], before: float, memory: float, own: bool) -> None:
    values = np.array(rates)
    total, area = _sums(values, before, Choice(memory, own))
    assert np.allclose(total, np.cumsum(values), rtol=0, atol=1e-15)
    assert np.allclose(area, areas(values, memory, values[0] if own else before), rtol=0, atol=1e-12)


def test_slopes_are_those_of_differences() -> None:
    """Of both laws, at points where every term counts; a fixed S1 of before has none."""
    rng = np.random.default_rng(3)
    x, z = rng.uniform(0.1, 1, 9), rng.normal(0, 1, 9)
    before = np.array([np.nan] * 6 + [0.4] * 3)
    for function, slopes, at in (
        (
            lambda p: annealing._change(p, x, z, before),
            lambda p: annealing._slopes(p, x, z, before),
            [0.5, 0.6, 0.8, 0.3, -1.2, 4.0, 0.7],
        ),
        (lambda p: replay._law(p, x, x[::-1]), lambda p: replay._slopes(p, x, x[::-1]), [2.0, 0.5, 0.7, 0.4, 0.3, 0.1, 0.6]),
    ):
        point = np.array(at)
        moved = [(function(point + step) - function(point - step)) / 2e-6 for step in 1e-6 * np.eye(7)]
        assert np.allclose(np.array(moved).T, slopes(point), rtol=1e-6, atol=1e-8)


# Replay

TRUTH = np.array([2.2, 0.3, 0.6, 0.3, 0.35, 0.05, 0.5])


def true_loss(d: np.ndarray | float, r: np.ndarray | float) -> np.ndarray:
    e, b, n, decay, c, shift, g = TRUTH
    return np.asarray(e + b * np.asarray(r) ** n / np.asarray(d) ** decay + c / (np.asarray(r) + shift) ** g)


def replayed(fraction: float, role: str, noise: float) -> Trained:
    steps = np.arange(0, STEPS + 1, 10, dtype=np.float64)
    share = fraction if role == "upstream" else 1 - fraction
    losses = np.concatenate([[2.6], true_loss(steps[1:] / STEPS, share)])
    losses += np.random.default_rng(int(1000 * fraction)).normal(0, noise, len(steps))
    config = {"replay": {"fraction": fraction} if fraction else None}
    return Trained(f"r{fraction}", f"r{fraction}", 1, config, {}, np.full(STEPS, 1e-3), 2048.0, {role: (steps, losses)})


@pytest.mark.parametrize("role", ["upstream", "downstream"])
def test_fractions_that_were_not_tried_are_predicted(role: str) -> None:
    family = Family([replayed(fraction, role, 0.001) for fraction in (0.0, 0.01, 0.05, 0.1, 0.25, 0.5)])
    law = fit_replay(family, role)
    assert law is not None and law.trial.holds
    for fraction in (0.03, 0.15, 0.4):
        share = fraction if role == "upstream" else 1 - fraction
        assert abs(float(law.loss(fraction)) - float(true_loss(1.0, share))) < max(law.trial.band, 0.004)
    assert [arm.inside for arm in law.trial.arms] == [False, True, True, True, True, False]


def test_too_few_fractions() -> None:
    assert fit_replay(Family([replayed(f, "upstream", 0.001) for f in (0.0, 0.01, 0.1, 0.5)]), "upstream") is None


def test_largest_share_of_new_data() -> None:
    """Where B is nothing the law can be inverted by hand: r = (C / (L - E))^(1/g) - e."""
    law = ReplayLaw("upstream", np.array([2.0, 0.0, 1, 1, 0.3, 0.1, 0.5]), 1.0, 1.0, 0.0, 0.5, Trial([]))
    limit = 2.6
    assert largest_new_share(law, limit) == pytest.approx(1 - ((0.3 / 0.6) ** 2 - 0.1), abs=3e-4)
    assert largest_new_share(law, 2.0 + 0.3 / math.sqrt(0.6) - 0.01) is None  # not even half of it is enough
    assert largest_new_share(law, 9.0) == 1.0


# Fitting


def test_a_spike_does_not_bend_the_fit() -> None:
    x = np.linspace(0, 1, 60)
    y = 1.5 + 0.7 * x
    y[5] += 8.0
    (a, b), _ = fit(lambda p: p[0] + p[1] * x - y, Bounds.of(a=(-9, 9), b=(-9, 9)), [[0.0, 0.0]])
    assert a == pytest.approx(1.5, abs=0.01) and b == pytest.approx(0.7, abs=0.01)
    bounded, _ = fit(lambda p: p[0] + p[1] * x - y, Bounds.of(a=(-9, 1.0), b=(-9, 9)), [[5.0, 0.0]])
    assert bounded[0] <= 1.0
    with pytest.raises(ValueError, match="at least one starting point"):
        fit(lambda p: p, Bounds.of(a=(0, 1)), [])


def test_bands() -> None:
    arms = [HeldOut("a", 2.0, 2.1, 2.5), HeldOut("b", 3.0, 2.9, 2.5), HeldOut("end", 3.0, 9.0, 2.5, inside=False)]
    trial = Trial(arms)
    assert trial.error == pytest.approx(0.1) and trial.error_of_mean == pytest.approx(0.5) and trial.holds
    assert trial.band == pytest.approx(0.1 * 2.919986, rel=1e-5)  # Student's t, two degrees of freedom, 95 % on one side
    assert Trial(arms[:1]).band == math.inf and not Trial(arms[:1]).holds
    assert not Trial([dataclasses.replace(arm, predicted=arm.measured + 0.6) for arm in arms]).holds
