"""LogME: how well the features of a model explain labels linearly, as the evidence of Bayesian ridge regression (You et al.,
arXiv 2102.11005).

y = F w + noise with w ~ N(0, 1/alpha) and noise ~ N(0, 1/beta) has the marginal likelihood p(y | F, alpha, beta); LogME is the
maximum of its logarithm over alpha and beta, per sample, averaged over one-hot classes. With the singular values s of F,
sigma = s^2, z = U'y, t = alpha / beta and k the rank of F:

    E(t) = |y|^2 - |z|^2 + sum z^2 t / (t + sigma)
    ln p = 1/2 sum ln(t / (t + sigma)) + n/2 (ln beta - ln 2 pi) - beta/2 E(t),   best at beta = n / E(t)

so one search over t finds the maximum. The authors' code counts all d columns in d/2 ln alpha but adds ln(alpha + beta sigma)
over the k singular values only: with fewer samples than columns that is not the evidence, and models of several widths don't
compare. The sum above takes k in both, which is exact, because columns beyond the rank add ln(alpha) - ln(alpha) = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Function = Callable[[Values], Values]

_GRID = np.linspace(-36.0, 36.0, 145)  # of ln t, relative to the largest sigma
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
_REFINEMENTS = 48  # golden sections of two grid steps: ln t to 1e-10
_EXACT = 1e-13  # share of |y|^2 that is left over by rounding alone


@dataclass(frozen=True)
class Evidence:
    """``per_sample``: max ln p(y | F) / n in nats, for each of c label vectors, (c,); inf where F explains one without noise.
    ``alpha``, ``beta``: the precisions of weights and noise at the maximum, (c,)."""

    per_sample: Values
    alpha: Values
    beta: Values


def evidence(features: Values, labels: Values, *, centred: bool = False) -> Evidence:
    """The evidence of ``features`` (n, d) for ``labels`` (n,) or (n, c). ``centred``: their means are subtracted, so that they
    are n - 1 samples in the space without the mean. Raises ``ValueError`` for features or a label vector that are zero
    throughout, or not finite."""
    labels = labels.reshape(len(labels), -1)
    if not (np.isfinite(features).all() and np.isfinite(labels).all()):
        raise ValueError("features and labels must be finite")
    left, singular, _ = np.linalg.svd(features.astype(np.float64), full_matrices=False)
    rank = int((singular > singular[0] * np.finfo(np.float64).eps * max(features.shape)).sum()) if singular.size else 0
    squares = (labels.astype(np.float64) ** 2).sum(0)
    if not rank or not squares.all():
        raise ValueError("features and labels must not be zero throughout")
    sigma = singular[:rank, None] ** 2
    z2 = (left[:, :rank].T @ labels) ** 2
    rest = np.maximum(squares - z2.sum(0), 0.0)
    rest[rest < _EXACT * squares] = 0.0
    n = len(labels) - centred

    def error(log_t: Values) -> Values:
        return rest + (z2 / (1.0 + sigma * np.exp(-log_t))).sum(0)

    def value(log_t: Values) -> Values:
        shrunk = -0.5 * np.log1p(sigma * np.exp(-log_t)).sum(0)
        return (shrunk + n / 2 * (np.log(n / error(log_t)) - 1.0 - math.log(2.0 * math.pi))) / n

    log_t = _highest(value, math.log(sigma[0, 0]) + _GRID, labels.shape[1])
    beta = n / error(log_t)
    found = np.where((rest == 0.0) & (n > rank), np.inf, value(log_t))
    return Evidence(found, np.exp(log_t) * beta, beta)


def _highest(value: Function, grid: Values, count: int) -> Values:
    """The arguments, (count,), at which each of ``count`` functions is highest: on ``grid``, then between its neighbours."""
    heights = np.stack([value(np.full(count, at)) for at in grid])
    best = heights.argmax(0)
    low, high = grid[np.maximum(best - 1, 0)], grid[np.minimum(best + 1, len(grid) - 1)]
    for _ in range(_REFINEMENTS):
        one, two = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        left = value(one) >= value(two)
        low, high = np.where(left, low, one), np.where(left, two, high)
    return (low + high) / 2.0


def standardised(features: NDArray[np.floating]) -> Values:
    """(n, d) features less their means over their deviations, float64; columns that don't vary become zero. LogME depends on
    the scale of channels, which differs between models for no reason that matters here."""
    centred = features.astype(np.float64)
    centred -= centred.mean(0)
    deviation = centred.std(0)
    return np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > 1e-12 * max(deviation.max(), 1e-300))


def logme(features: Values, classes: NDArray[np.integer]) -> float:
    """LogME of ``features`` (n, d) for ``classes`` (n,): the mean of the evidences of the one-hot vectors of those that occur.
    Means are subtracted, so that a constant is free, which the authors' code leaves to the features. Raises ``ValueError`` for
    fewer than two classes."""
    known = np.unique(classes)
    if len(known) < 2:
        raise ValueError(f"LogME compares two classes or more, found {len(known)}")
    members = (classes[:, None] == known).astype(np.float64)
    found = evidence(features - features.mean(0), members - members.mean(0), centred=True)
    return float(found.per_sample.mean())
