"""Statistics over seeds: a measure's spread, and the difference of two arms, paired by seed, with its uncertainty.

Runs of two arms with the same seed share their start checkpoint and the order of their data, so their difference varies less
than each of them: https://en.wikipedia.org/wiki/Paired_difference_test.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

LEVEL = 0.95

_ROUNDING = 1e-6  # nats, for losses of some nats: far less than the effect of a seed

# Quantiles 0.975 of Student's t for 1 to 10 degrees of freedom; above, the series below is exact to four digits.
_T = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139)


def t_quantile(freedom: int) -> float:
    """The 0.975 quantile of Student's t distribution with ``freedom`` degrees of freedom, at least 1.

    Above 10 by the Cornish-Fisher expansion (Abramowitz and Stegun, 26.7.5).
    """
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = 1.959963985
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


@dataclasses.dataclass(frozen=True)
class Spread:
    """Finite values of a measure over seeds. ``others`` counts the seeds with an infinite value: diverged, or never reached."""

    values: tuple[float, ...]
    others: int = 0

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation (n - 1); ``None`` with fewer than two values."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def low(self) -> float | None:
        return min(self.values, default=None)

    @property
    def high(self) -> float | None:
        return max(self.values, default=None)


def spread_of(values: Sequence[float]) -> Spread:
    """The spread of ``values``. Infinite values are only counted; NaN counts as infinite."""
    finite = tuple(value for value in values if math.isfinite(value))
    return Spread(finite, len(values) - len(finite))


@dataclasses.dataclass(frozen=True)
class Difference:
    """Paired differences of one measure, arm minus reference, one for every seed that both have."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def margin(self) -> float | None:
        """Half the width of the 95 % interval of the mean, t * s / sqrt(n); ``None`` for one seed, whose noise is unknown."""
        count = len(self.values)
        return t_quantile(count - 1) * statistics.stdev(self.values) / math.sqrt(count) if count > 1 else None

    @property
    def established(self) -> bool:
        """Whether the 95 % interval excludes 0. Never for one seed, nor for a rounding error."""
        return self.margin is not None and abs(self.mean) > max(self.margin, _ROUNDING)


def paired(arm: Mapping[int | None, float], reference: Mapping[int | None, float]) -> Difference | None:
    """The difference over the seeds for which both values are finite; ``None`` if there are none."""
    values = tuple(
        arm[seed] - reference[seed]
        for seed in arm
        if seed in reference and math.isfinite(arm[seed]) and math.isfinite(reference[seed])
    )
    return Difference(values) if values else None
