"""The loss of a continued run as a function of its learning rates: the annealing law of continual pre-training.

After arXiv 2408.11029 (S1, S2) and arXiv 2505.07796, whose form is second-hand here: docs/advisor.md says what is used.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from megarewarm.laws.arms import Family, Floats, Trained
from megarewarm.laws.fitting import Bounds, HeldOut, Trial, fit
from megarewarm.schedules.annealing import learning_rate_sums

MEMORIES = (0.999, 0.99, 0.97, 0.9, 0.0)
"""Candidates for lambda. The published 0.999 remembers 1,000 steps, more than a short run has."""

NEEDED = 4
"""Arms with different schedules below which nothing is fitted: one of them is held out at a time."""

_BOUNDS = Bounds.of(A=(0, 20), a=(0.05, 3), x0=(0.01, 1000), C=(0, 20), B=(-20, 20), E=(0.01, 1000), b=(0.05, 3))
_STARTS = [[0.5, 0.5, 1.0, 0.3, size, rate, 0.5] for size, rate in itertools.product((1.0, -1.0), (3.0, 50.0))]


@dataclasses.dataclass(frozen=True)
class Choice:
    """``memory`` is lambda of S2. ``own_rate``: the rate before the first step is taken as that step's own, as the published
    law has it; otherwise as the last one of the checkpoint, so that a re-warming without warmup counts too."""

    memory: float
    own_rate: bool


@dataclasses.dataclass(frozen=True)
class AnnealingLaw:
    """L(t) - L(0) = A ((x0 + x)^-a - x0^-a) - C z + B (1 - (1 + E x)^-b), x = S1 / ``unit``, z = S2 / ``area_unit``.

    ``parameters`` are A, a, x0, C, B, E, b; x0 is S1 of the training before, fixed where it is known.
    """

    parameters: Floats
    choice: Choice
    unit: float
    area_unit: float
    trial: Trial

    def change(self, rates: ArrayLike, rate_before: float | None, sum_before: float | None) -> Floats:
        """Loss minus the start checkpoint's after each step of ``rates`` (steps,), in nats per token, (steps,)."""
        total, area = _sums(np.asarray(rates, dtype=np.float64), rate_before, self.choice)
        before = np.full(len(total), np.nan if sum_before is None else sum_before / self.unit)
        return _change(self.parameters, total / self.unit, area / self.area_unit, before)


def fit_annealing(family: Family, role: str) -> AnnealingLaw | None:
    """The law fitted to all evaluations of ``role`` of the family's runs; ``None`` for fewer than four different arms.

    lambda and the rate before the first step are those whose held-out errors are smallest.
    """
    if len(_distinct(family)) < NEEDED:
        return None
    known = all(run.rate_before is not None for run in family.runs)
    best: AnnealingLaw | None = None
    for memory, own in itertools.product(MEMORIES, (True, False) if known else (True,)):
        law = _fitted(family, role, Choice(memory, own))
        if best is None or law.trial.error < best.trial.error:
            best = law
    return best


def _fitted(family: Family, role: str, choice: Choice) -> AnnealingLaw:
    unit = max(float(run.rates.sum()) for run in family.runs)
    sums = {run.name: _sums(run.rates, run.rate_before, choice) for run in family.runs}
    area_unit = max(float(np.abs(area).max()) for _, area in sums.values()) or 1.0
    points = {run.name: _points(run, role, sums[run.name], unit, area_unit) for run in family.runs}
    parameters, _ = _solve([points[run.name] for run in family.runs], _STARTS)
    held = []
    for arm in family.arms:
        rest, _ = _solve([points[run.name] for run in family.without(arm)], [parameters])
        left_out = family.of(arm)
        predicted = [run.start(role) + _end(rest, points[run.name]) for run in left_out]
        others = np.mean([run.final(role) - run.start(role) for run in family.without(arm)])
        held.append(
            HeldOut(
                arm=arm,
                measured=family.mean_final(arm, role),
                predicted=float(np.mean(predicted)),
                mean_of_others=float(np.mean([run.start(role) for run in left_out]) + others),
            )
        )
    return AnnealingLaw(parameters, choice, unit, area_unit, Trial(held))


@dataclasses.dataclass(frozen=True)
class _Points:
    """Evaluations: S1, S2 and S1 of before in units (NaN where unknown), and the loss minus the start's, each (points,)."""

    x: Floats
    z: Floats
    before: Floats
    change: Floats


def _points(run: Trained, role: str, sums: tuple[Floats, Floats], unit: float, area_unit: float) -> _Points:
    steps, losses = run.losses[role]
    after = steps >= 1
    at = steps[after].astype(int) - 1
    before = np.nan if run.sum_before is None else run.sum_before / unit
    return _Points(sums[0][at] / unit, sums[1][at] / area_unit, np.full(len(at), before), losses[after] - losses[0])


def _end(parameters: Floats, points: _Points) -> float:
    """The predicted change at the last evaluation."""
    return float(_change(parameters, points.x[-1:], points.z[-1:], points.before[-1:])[0])


def _solve(points: Sequence[_Points], starts: Sequence[ArrayLike]) -> tuple[Floats, float]:
    fields = zip(*((one.x, one.z, one.before, one.change) for one in points), strict=True)
    x, z, before, change = (np.concatenate(field) for field in fields)
    return fit(lambda parameters: _change(parameters, x, z, before) - change, _BOUNDS, starts, evaluations=60)


def _change(parameters: Floats, x: Floats, z: Floats, before: Floats) -> Floats:
    big_a, a, free, c, big_b, e, b = parameters
    x0 = np.where(np.isnan(before), free, np.maximum(before, 1e-3))
    return np.asarray(big_a * ((x0 + x) ** -a - x0**-a) - c * z + big_b * (1 - (1 + e * x) ** -b), dtype=np.float64)


def _sums(rates: Floats, rate_before: float | None, choice: Choice) -> tuple[Floats, Floats]:
    """S1 and S2 (steps,) of a run's own steps."""
    if choice.own_rate or rate_before is None:
        sums = learning_rate_sums(rates, choice.memory)
        return sums.total, sums.area
    sums = learning_rate_sums(np.concatenate([[rate_before], rates]), choice.memory)
    return sums.total[1:] - rate_before, sums.area[1:]


def _distinct(family: Family) -> set[tuple[float, ...]]:
    return {tuple(np.round(run.rates, 12)) for run in family.runs}
