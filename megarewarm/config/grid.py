"""The steps at which something happens at an interval: the one rule by which shares of a run and tokens become steps."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction


class Grid:
    """The points round(k x ``interval``), k = 1, 2, ... (to even, as Python rounds), of an interval of at least one step.

    The interval itself is never rounded: of two intervals of which one is a multiple of the other, the points of the longer
    one are points of the shorter one, in a run of any length.
    """

    def __init__(self, interval: Fraction | int) -> None:
        self.interval = max(Fraction(1), Fraction(interval))
        self._above, self._below = self.interval.numerator, self.interval.denominator

    def point(self, number: int) -> int:
        """The step of the k-th point."""
        whole, rest = divmod(number * self._above, self._below)
        return whole + (2 * rest > self._below or (2 * rest == self._below and whole % 2 == 1))

    def number(self, step: int) -> int | None:
        """Which point ``step`` is, from 1; None where it is none."""
        near = step * self._below // self._above
        return next((k for k in (near, near + 1) if k > 0 and self.point(k) == step), None)

    def count(self, last: int) -> int:
        """How many points there are up to step ``last``."""
        near = max(0, last) * self._below // self._above
        return near + 1 if self.point(near + 1) <= last else near

    def points(self, last: int) -> Iterator[int]:
        """All points up to step ``last``, ascending."""
        return (self.point(k) for k in range(1, self.count(last) + 1))

    def between(self, first: int, last: int) -> list[int]:
        """The points after step ``first`` up to step ``last``, ascending."""
        return [self.point(number) for number in range(self.count(first) + 1, self.count(last) + 1)]

    def is_multiple_of(self, other: Grid) -> bool:
        """Whether every point is one of ``other``'s."""
        return (self.interval / other.interval).denominator == 1

    def __str__(self) -> str:
        return f"{float(self.interval):g} steps"
