"""Robust least squares from several starting points, and leave-one-out tests of the fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares
from scipy.stats import t as student

Floats = NDArray[np.float64]

HUBER = 0.01
"""Residuals beyond this, in nats per token, count linearly, so that a stability gap's spike doesn't bend the whole curve."""

_CONFIDENCE = 0.9
_NO_TERM = 1e-3  # nats


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Names of the parameters with their lower and upper bounds, each (parameters,)."""

    names: tuple[str, ...]
    low: Floats
    high: Floats

    @classmethod
    def of(cls, **limits: tuple[float, float]) -> Bounds:
        pairs = np.array(list(limits.values()), dtype=np.float64)
        return cls(tuple(limits), pairs[:, 0], pairs[:, 1])


def fit(
    residuals: Callable[[Floats], Floats],
    bounds: Bounds,
    starts: Sequence[ArrayLike],
    evaluations: int = 200,
    slopes: Callable[[Floats], Floats] | None = None,
) -> tuple[Floats, float]:
    """The parameters (parameters,) with the least Huber loss of ``residuals`` (points,), and that loss. ``slopes`` are the
    residuals' derivatives (points, parameters), by default from finite differences.

    Returns the best of the local minima reached from ``starts``. Raises ValueError without a start.
    """
    best: tuple[Floats, float] | None = None
    for start in starts:
        inside = np.clip(np.asarray(start, dtype=np.float64), bounds.low, bounds.high)
        found = least_squares(
            residuals,
            inside,
            jac=slopes or "2-point",
            bounds=(bounds.low, bounds.high),
            loss="huber",
            f_scale=HUBER,
            x_scale="jac",
            max_nfev=evaluations,
        )
        if best is None or found.cost < best[1]:
            best = np.asarray(found.x, dtype=np.float64), float(found.cost)
    if best is None:
        raise ValueError("a fit needs at least one starting point")
    return best


def standard_error(
    residuals: Callable[[Floats], Floats], predict: Callable[[Floats], float], parameters: Floats, bounds: Bounds, runs: int
) -> float:
    """Standard error of a prediction, in nats per token, from the parameters' covariance (J^T J)^-1 s^2.

    Infinite if the prediction depends on a combination of parameters that the residuals don't determine. Parameters at a bound
    are fixed. Errors within one run are correlated, so the number of observations is ``runs``.
    """
    free = [i for i in range(len(parameters)) if bounds.low[i] < parameters[i] < bounds.high[i]]
    base, at = residuals(parameters), predict(parameters)
    if not free:
        return math.inf
    columns, slope = [], []
    for i in free:
        size = max(abs(float(parameters[i])), 1e-3)
        moved = parameters.copy()
        step = 1e-5 * size if parameters[i] + 1e-5 * size < bounds.high[i] else -1e-5 * size
        moved[i] += step
        columns.append((residuals(moved) - base) / step * size)
        slope.append((predict(moved) - at) / step * size)
    _, singular, rows = np.linalg.svd(np.array(columns).T, full_matrices=False)
    along = rows @ np.array(slope)
    known = singular > 1e-9 * singular[0]
    if np.any(np.abs(along[~known]) > 1e-3) or not known.any():
        return math.inf
    spread = math.sqrt(float(np.mean(np.minimum(base**2, HUBER * np.abs(base)))) * len(base) / runs)
    return spread * float(np.linalg.norm(along[known] / singular[known]))


def at_bounds(parameters: Floats, bounds: Bounds, terms: dict[str, str], fixed: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of the parameters at a bound: the data call for a law beyond it. ``terms`` maps each shape parameter to its
    amplitude; if that is near 0, the shape parameter has no meaning. An amplitude of 0 is an unused term."""
    place = dict(zip(bounds.names, zip(parameters, bounds.low, bounds.high, strict=True), strict=True))
    found = []
    for name, (value, low, high) in place.items():
        if name in fixed or (name in terms and abs(place[terms[name]][0]) < _NO_TERM):
            continue
        below = low != 0 and value <= low + 1e-3 * abs(low)
        if below or value >= high - 1e-3 * abs(high):
            found.append(name)
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """An arm that was held out of a fit: its final loss (mean over seeds) as measured, as predicted, and as predicted by the
    mean of the other arms. ``inside``: whether arms on both sides of it were in the fit. ``level`` names everything that was
    held out together, ``along`` the direction of this level."""

    arm: str
    measured: float
    predicted: float
    mean_of_others: float
    inside: bool = True
    along: str = "arm"
    level: str = ""

    @property
    def error(self) -> float:
        return self.predicted - self.measured


@dataclasses.dataclass(frozen=True)
class Trial:
    """A law's results on held-out levels: root mean square errors in nats per token of its predictions, and of the mean of the
    others, over the arms inside; and the half-width of the 90 % band of a prediction, infinite for under two.

    ``fitted`` are the law's errors at the final losses of the arms in the fit, ``least`` is a lower bound of the band from
    other families, ``stuck`` names the parameters at their bounds.
    """

    arms: list[HeldOut]
    fitted: tuple[float, ...] = ()
    least: float = 0.0
    stuck: tuple[str, ...] = ()

    def counted(self) -> list[HeldOut]:
        """The arms whose errors count: those inside the range of the remaining arms."""
        return [arm for arm in self.arms if arm.inside]

    @property
    def error(self) -> float:
        return _rms([arm.error for arm in self.counted()])

    @property
    def error_of_mean(self) -> float:
        return _rms([arm.mean_of_others - arm.measured for arm in self.counted()])

    @property
    def band(self) -> float:
        """Student's t times the error, in the worst direction, with a degree of freedom for every held-out level: if errors are
        normal, a new arm's error stays within it in 90 % of cases. At least the largest error seen."""
        counted = self.counted()
        if len(counted) < 2:
            return math.inf
        seen = max(abs(error) for error in (*(arm.error for arm in counted), *self.fitted))
        return max(seen, self.least, *(quantile(levels) * error for levels, error in self.by_direction()))

    def by_direction(self) -> list[tuple[int, float]]:
        """For every direction, the number of levels that were held out and counted, and the error over them."""
        found: dict[str, dict[str, list[float]]] = {}
        for arm in self.counted():
            found.setdefault(arm.along, {}).setdefault(arm.level or arm.arm, []).append(arm.error)
        return [(len(levels), _rms([_rms(errors) for errors in levels.values()])) for levels in found.values()]

    @property
    def holds(self) -> bool:
        """Whether the law predicts unseen arms: better than the others' mean, with a band narrower than half the range of the
        arms, and with parameters inside their bounds."""
        if self.stuck or len(self.counted()) < 2 or not self.error < self.error_of_mean:
            return False
        return 2 * self.band < self.range

    @property
    def range(self) -> float:
        """Difference between the worst and the best arm, in nats per token."""
        measured = [arm.measured for arm in self.arms]
        return max(measured) - min(measured) if measured else 0.0


def quantile(count: int) -> float:
    """Student's t for the 90 % band of a value whose error is estimated from ``count`` others."""
    return float(student.ppf((1 + _CONFIDENCE) / 2, count))


def pooled(trials: Sequence[Trial]) -> list[Trial]:
    """The trials of one law in several families, each with a band at least that of all of them together, because the error in
    one family may be small by chance."""
    rows = [row for trial in trials for row in trial.by_direction()]
    if len(trials) < 2 or not rows:
        return list(trials)
    count = sum(levels for levels, _ in rows)
    least = quantile(count) * math.sqrt(sum(levels * error**2 for levels, error in rows) / count)
    return [dataclasses.replace(trial, least=least) for trial in trials]


def _rms(errors: Sequence[float]) -> float:
    return math.sqrt(sum(error * error for error in errors) / len(errors)) if errors else math.inf
