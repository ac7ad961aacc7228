"""The loss of a continued run as a function of its learning rates: the annealing law of continual pre-training.

After arXiv 2408.11029 (S1, S2) and arXiv 2505.07796, whose form comes from a secondary source: see docs/advisor.md.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from megarewarm.laws.arms import Family, Floats, Trained, distinct_rates
from megarewarm.laws.fitting import Bounds, HeldOut, Trial, at_bounds, fit, standard_error
from megarewarm.laws.support import Fold, Space
from megarewarm.schedules.annealing import learning_rate_sums

MEMORIES = (0.999, 0.99, 0.97, 0.9, 0.0)
"""Candidates for lambda. The published 0.999 remembers 1,000 steps, more than a short run has."""

NEEDED = 4
"""Minimum number of distinct schedules for a fit."""

_BOUNDS = Bounds.of(A=(0, 20), a=(0.05, 3), x0=(0.01, 1000), C=(0, 20), B=(-20, 20), E=(0.01, 1000), b=(0.05, 3))
_TERMS = {"a": "A", "x0": "A", "E": "B", "b": "B"}
_STARTS = [[0.5, 0.5, 1.0, 0.3, size, rate, 0.5] for size, rate in itertools.product((1.0, -1.0), (3.0, 50.0))]


@dataclasses.dataclass(frozen=True)
class Choice:
    """``memory`` is lambda of S2. ``own_rate``: the rate before the first step is that step's own rate, as in the published
    law; otherwise it is the checkpoint's last rate, so that re-warming without warmup counts too."""

    memory: float
    own_rate: bool


@dataclasses.dataclass(frozen=True)
class AnnealingLaw:
    """L(t) - L(0) = A ((x0 + x)^-a - x0^-a) - C z + B (1 - (1 + E x)^-b), x = S1 / ``unit``, z = S2 / ``area_unit``.

    ``parameters`` are A, a, x0, C, B, E, b; x0 is S1 of the earlier training, fixed if known.
    """

    parameters: Floats
    choice: Choice
    unit: float
    area_unit: float
    trial: Trial
    form: _Form
    runs: tuple[Trained, ...]

    def change(self, rates: ArrayLike, rate_before: float | None, sum_before: float | None) -> Floats:
        """Loss minus the start checkpoint's after each step of ``rates`` (steps,), in nats per token, (steps,)."""
        total, area = _sums(np.asarray(rates, dtype=np.float64), rate_before, self.choice)
        before = np.full(len(total), np.nan if sum_before is None else sum_before / self.unit)
        return _change(self.parameters, total / self.unit, area / self.area_unit, before)

    def uncertainty(self, rates: ArrayLike, rate_before: float | None, sum_before: float | None) -> float:
        """Standard error of the last value of ``change`` from the fit, in nats per token; infinite if it isn't identified."""

        def end(parameters: Floats) -> float:
            return float(dataclasses.replace(self, parameters=parameters).change(rates, rate_before, sum_before)[-1])

        return standard_error(self.form.residuals(self.runs), end, self.parameters, _BOUNDS, len(self.runs))


def fit_annealing(family: Family, role: str, space: Space | None = None) -> AnnealingLaw | None:
    """Fit the law to all evaluations of ``role`` of the family's runs; ``None`` for fewer than four distinct schedules.

    lambda and the rate before the first step are those of the best fit, chosen again for every held-out level.
    """
    if len(distinct_rates(family.runs)) < NEEDED:
        return None
    space = Space.of_schedules(family) if space is None else space
    known = all(run.rate_before is not None for run in family.runs)
    forms = [_Form(family, role, Choice(m, own)) for m, own in itertools.product(MEMORIES, (True, False) if known else (True,))]
    fits = [form.solve(family.runs, _STARTS) for form in forms]
    best = min(range(len(forms)), key=lambda index: fits[index][1])
    folds = space.folds()
    folds += [Fold("arm", arm, (arm,), frozenset([arm])) for arm in family.arms if not space.points]
    held = []
    for fold in folds:
        rest = [run for run in family.runs if run.arm not in fold.arms]
        if len(distinct_rates(rest)) < NEEDED - 1:
            continue
        again = [form.solve(rest, [fits[index][0]]) for index, form in enumerate(forms)]
        chosen = min(range(len(forms)), key=lambda index: again[index][1])
        others = float(np.mean([run.final(role) - run.start(role) for run in rest]))
        for arm in fold.arms:
            change = float(np.mean([forms[chosen].end(again[chosen][0], run) for run in family.of(arm)]))
            start, inside = family.mean_start(role), arm in fold.inside
            held.append(
                HeldOut(arm, family.mean_final(arm, role), start + change, start + others, inside, fold.along, fold.level)
            )
    form, (parameters, _) = forms[best], fits[best]
    fitted = [
        float(np.mean([form.end(parameters, run) - (run.final(role) - run.start(role)) for run in family.of(arm)]))
        for arm in family.arms
    ]
    fixed = ["x0"] if all(run.sum_before is not None for run in family.runs) else []
    trial = Trial(held, tuple(fitted), stuck=at_bounds(parameters, _BOUNDS, _TERMS, fixed))
    return AnnealingLaw(parameters, form.choice, form.unit, form.area_unit, trial, form, tuple(family.runs))


class _Form:
    """The law with lambda and the rate before the first step fixed, and a family's runs in its units."""

    def __init__(self, family: Family, role: str, choice: Choice) -> None:
        self.choice = choice
        self.unit = max(float(run.rates.sum()) for run in family.runs)
        sums = {run.name: _sums(run.rates, run.rate_before, choice) for run in family.runs}
        self.area_unit = max(float(np.abs(area).max()) for _, area in sums.values()) or 1.0
        self._points = {run.name: _points(run, role, sums[run.name], self.unit, self.area_unit) for run in family.runs}

    def solve(self, runs: Sequence[Trained], starts: Sequence[ArrayLike]) -> tuple[Floats, float]:
        """The parameters for these runs, and the loss of the fit."""
        x, z, before, _ = self._columns(runs)
        return fit(self.residuals(runs), _BOUNDS, starts, evaluations=60, slopes=lambda p: _slopes(p, x, z, before))

    def residuals(self, runs: Sequence[Trained]) -> Callable[[Floats], Floats]:
        x, z, before, change = self._columns(runs)
        return lambda parameters: _change(parameters, x, z, before) - change

    def _columns(self, runs: Sequence[Trained]) -> tuple[Floats, Floats, Floats, Floats]:
        told = [self._points[run.name] for run in runs]
        x, z, before, change = (np.concatenate([getattr(one, name) for one in told]) for name in ("x", "z", "before", "change"))
        return x, z, before, change

    def end(self, parameters: Floats, run: Trained) -> float:
        """The predicted change of the loss at the run's last evaluation."""
        points = self._points[run.name]
        return float(_change(parameters, points.x[-1:], points.z[-1:], points.before[-1:])[0])


@dataclasses.dataclass(frozen=True)
class _Points:
    """Evaluations: S1, S2 and earlier S1 in units (NaN if unknown), and the loss minus the start's, each (points,)."""

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


def _change(parameters: Floats, x: Floats, z: Floats, before: Floats) -> Floats:
    big_a, a, free, c, big_b, e, b = parameters
    x0 = np.where(np.isnan(before), free, np.maximum(before, 1e-3))
    return np.asarray(big_a * ((x0 + x) ** -a - x0**-a) - c * z + big_b * (1 - (1 + e * x) ** -b), dtype=np.float64)


def _slopes(parameters: Floats, x: Floats, z: Floats, before: Floats) -> Floats:
    """The derivatives of ``_change`` with respect to its parameters, (points, 7)."""
    big_a, a, free, _, big_b, e, b = parameters
    unknown = np.isnan(before)
    x0 = np.where(unknown, free, np.maximum(before, 1e-3))
    after, start, shifted = (x0 + x) ** -a, x0**-a, (1 + e * x) ** -b
    by_a = big_a * (start * np.log(x0) - after * np.log(x0 + x))
    by_x0 = np.where(unknown, big_a * a * (start / x0 - after / (x0 + x)), 0.0)
    by_e, by_b = big_b * b * x * shifted / (1 + e * x), big_b * shifted * np.log1p(e * x)
    return np.stack([after - start, by_a, by_x0, -z, 1 - shifted, by_e, by_b], axis=1)


def _sums(rates: Floats, rate_before: float | None, choice: Choice) -> tuple[Floats, Floats]:
    """S1 and S2 (steps,) over a run's own steps."""
    if choice.own_rate or rate_before is None:
        sums = learning_rate_sums(rates, choice.memory)
        return sums.total, sums.area
    sums = learning_rate_sums(np.concatenate([[rate_before], rates]), choice.memory)
    return sums.total[1:] - rate_before, sums.area[1:]
