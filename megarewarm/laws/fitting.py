"""Robust least squares from several starting points, and what leaving one arm out says of the fit."""

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
"""Residuals beyond this, in nats per token, count linearly: a stability gap's spike shall not bend the whole curve."""

_CONFIDENCE = 0.9


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
    residuals: Callable[[Floats], Floats], bounds: Bounds, starts: Sequence[ArrayLike], evaluations: int = 200
) -> tuple[Floats, float]:
    """The parameters (parameters,) with the least Huber loss of ``residuals`` (points,), and that loss.

    The best of the local minima found from ``starts``. Raises ValueError without a start.
    """
    best: tuple[Floats, float] | None = None
    for start in starts:
        inside = np.clip(np.asarray(start, dtype=np.float64), bounds.low, bounds.high)
        found = least_squares(
            residuals,
            inside,
            bounds=(bounds.low, bounds.high),
            loss="huber",
            f_scale=HUBER,
            x_scale="jac",
            max_nfev=evaluations,
        )
        if best is None or found.cost < best[1]:
            best = np.asarray(found.x, dtype=np.float64), float(found.cost)
    if best is None:
        raise ValueError("a fit needs a place to start from")
    return best


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """An arm that was left out of a fit: its final loss (mean over seeds) as measured, as predicted, and as the mean of the
    other arms' would have it. ``inside`` says that arms on both sides of it were in the fit."""

    arm: str
    measured: float
    predicted: float
    mean_of_others: float
    inside: bool = True

    @property
    def error(self) -> float:
        return self.predicted - self.measured


@dataclasses.dataclass(frozen=True)
class Trial:
    """What the held-out arms say of a law: root mean square errors in nats per token of its predictions, and of the mean of
    the others, over the arms that lie inside; and the half-width of the 90 % band of a prediction, infinite for under two."""

    arms: list[HeldOut]

    def _counted(self) -> list[HeldOut]:
        return [arm for arm in self.arms if arm.inside]

    @property
    def error(self) -> float:
        return _rms([arm.error for arm in self._counted()])

    @property
    def error_of_mean(self) -> float:
        return _rms([arm.mean_of_others - arm.measured for arm in self._counted()])

    @property
    def band(self) -> float:
        """Student's t times the error: a new arm's error stays within it in 90 % of cases, were they normal."""
        count = len(self._counted())
        return float(student.ppf((1 + _CONFIDENCE) / 2, count)) * self.error if count >= 2 else math.inf

    @property
    def holds(self) -> bool:
        """Whether the law predicts arms that it hasn't seen better than their mean does."""
        return len(self._counted()) >= 2 and self.error < self.error_of_mean


def _rms(errors: Sequence[float]) -> float:
    return math.sqrt(sum(error * error for error in errors) / len(errors)) if errors else math.inf
