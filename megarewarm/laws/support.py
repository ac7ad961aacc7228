"""What varies among arms, and which points are inside the tested range: nothing outside it is predicted.

A point has a kind (the curve and other settings that are not numbers) and values along directions (peak, warmup, replay, ...).
A point is inside if arms of its kind surround it in every direction and in their combinations (the convex hull of the arms),
and if it is no further from an arm than a held-out level was.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import nnls

from megarewarm.errors import UserError
from megarewarm.laws.arms import Family, Trained
from megarewarm.schedules.schedule import Schedule

RATES = ("max_lr", "min_lr", "constant_lr")
"""Directions measured by their logarithms. All others but ``timescale`` are shares of the run's steps, or of data."""

LENGTHS = ("warmup_steps", "length", "decay", "cooldown", "constant")
FRACTION = "fraction"

_SAME = 1e-4  # values that differ by less are one level: of a logarithm, or of a share
_WRONG = 0.02  # of the sum of rates: if a run's rates are further from its schedule's, its kind is unknown
_MOST = 4000  # points of a grid


@dataclasses.dataclass(frozen=True)
class Point:
    """``values`` by direction: logarithms of rates, shares of the steps, replay fraction."""

    kind: tuple[str, ...]
    values: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Fold:
    """Arms that are held out together: all those at one ``level`` of the direction ``along``, or a single one. ``inside`` are
    those inside the range of the remaining arms."""

    along: str
    level: str
    arms: tuple[str, ...]
    inside: frozenset[str]


def schedule_point(run: Trained) -> Point | None:
    """The point of the run's schedule; ``None`` if its rates are not those of its recorded schedule."""
    try:
        schedule = Schedule.from_spec(run.schedule)
        rates = schedule.values(np.arange(len(run.rates)))
    except (UserError, TypeError, ValueError, AttributeError):
        return None
    if not np.abs(rates - run.rates).sum() <= _WRONG * run.rates.sum():
        return None
    kind, values = [], {}
    for name, value in schedule.spec().items():
        if name in LENGTHS:
            values[name] = float(value) / run.steps
        elif isinstance(value, str | bool) or value == 0:  # a rate of 0 has no logarithm
            kind.append(f"{name} {value}")
        else:
            values[name] = math.log(value) if name in RATES else float(value)
    return Point((*kind, *values), values)


def replay_point(run: Trained) -> Point:
    return Point((FRACTION,), {FRACTION: run.replay})


@dataclasses.dataclass(frozen=True)
class Space:
    """The points of a family's arms. ``diverged`` are those of diverged arms, next to which nothing is predicted."""

    points: dict[str, Point]
    diverged: list[Point] = dataclasses.field(default_factory=list)

    @classmethod
    def of_schedules(cls, family: Family) -> Space:
        """Arms with an unknown schedule have no point."""
        known = [(run.arm, schedule_point(run)) for run in family.runs]
        lost = [point for run in family.diverged if (point := schedule_point(run)) is not None]
        return cls({arm: point for arm, point in known if point is not None}, lost)

    @classmethod
    def of_replay(cls, family: Family) -> Space:
        return cls({run.arm: replay_point(run) for run in family.runs}, [replay_point(run) for run in family.diverged])

    @property
    def kinds(self) -> list[tuple[str, ...]]:
        return list(dict.fromkeys(point.kind for point in self.points.values()))

    def of(self, kind: tuple[str, ...]) -> dict[str, Point]:
        return {arm: point for arm, point in self.points.items() if point.kind == kind}

    def levels(self, kind: tuple[str, ...], along: str) -> list[float]:
        """The distinct values of arms of ``kind`` along a direction, ascending."""
        return _levels([point.values[along] for point in self.of(kind).values()])

    def arm_at(self, point: Point) -> str | None:
        """The arm that was run at exactly this point."""
        same = (arm for arm, other in self.of(point.kind).items() if _close(other, point))
        return next(same, None)

    def inside(self, point: Point, without: Sequence[str] = ()) -> bool:
        """Whether ``point`` is in the convex hull of the arms of its kind, except those in ``without``."""
        others = [other for arm, other in self.of(point.kind).items() if arm not in without]
        if not others:
            return False
        names = list(point.values)
        corners = np.array([[other.values[name] for name in names] for other in others])
        place = np.array([point.values[name] for name in names])
        span = np.ptp(corners, axis=0)
        flat = span <= _SAME
        if np.any(np.abs(corners[0] - place)[flat] > _SAME):
            return False
        if flat.all():
            return True
        matrix = ((corners - corners.min(axis=0)) / np.where(flat, 1.0, span))[:, ~flat]
        goal = ((place - corners.min(axis=0)) / np.where(flat, 1.0, span))[~flat]
        _, distance = nnls(np.vstack([matrix.T, np.ones(len(others))]), np.append(goal, 1.0))
        return bool(distance < 1e-3)

    def folds(self) -> list[Fold]:
        """Every level of every direction held out, and every single point; each set of arms once."""
        found: dict[tuple[str, ...], Fold] = {}
        for kind in self.kinds:
            arms = self.of(kind)
            for along in next(iter(arms.values())).values:
                levels = self.levels(kind, along)
                for level in levels if len(levels) > 1 else []:
                    out = tuple(arm for arm, point in arms.items() if abs(point.values[along] - level) <= _SAME)
                    found.setdefault(out, self._fold(along, f"{along} {natural(along, level):.6g}", out))
            for point in arms.values():
                out = tuple(arm for arm, other in arms.items() if _close(other, point))
                found.setdefault(out, self._fold("arm", out[0], out))
        return list(found.values())

    def _fold(self, along: str, level: str, out: tuple[str, ...]) -> Fold:
        return Fold(along, level, out, frozenset(arm for arm in out if self.inside(self.points[arm], out)))

    def between(self, kind: tuple[str, ...], along: str) -> list[tuple[float, float]]:
        """Neighbouring levels between which predictions are allowed: their middle is no further from them than a held-out level
        was from its nearest neighbour. Empty for fewer than three levels, because none of them can be held out."""
        levels = self.levels(kind, along)
        if len(levels) < 3:
            return []
        reach = max(min(here - low, high - here) for low, here, high in zip(levels, levels[1:], levels[2:], strict=False))
        return [(low, high) for low, high in itertools.pairwise(levels) if (high - low) / 2 <= reach * (1 + 1e-9)]

    def candidates(self, kind: tuple[str, ...], further: Sequence[float] = ()) -> list[Point]:
        """All combinations of levels, and of middles between neighbours, that are inside. ``further`` are additional values to
        try in every direction."""
        arms = self.of(kind)
        directions = list(next(iter(arms.values())).values)
        choices = []
        for along in directions:
            levels = self.levels(kind, along)
            gaps = self.between(kind, along)
            middles = [(low + high) / 2 for low, high in gaps]
            middles += [value for value in further if any(low < value < high for low, high in gaps)]
            choices.append(_levels([*levels, *middles]))
        if math.prod(map(len, choices)) > _MOST:
            choices = [self.levels(kind, along) for along in directions]
        points = (Point(kind, dict(zip(directions, values, strict=True))) for values in itertools.product(*choices))
        return [point for point in itertools.islice(points, _MOST) if self.inside(point) and not self._beside_diverged(point)]

    def _beside_diverged(self, point: Point) -> bool:
        """Whether a diverged arm is at a corner of the cell of levels that contains ``point``."""
        for lost in self.diverged:
            if lost.kind != point.kind:
                continue
            near = True
            for along, value in point.values.items():
                levels = _levels([*self.levels(point.kind, along), lost.values[along]])
                low, high = sorted((value, lost.values[along]))
                near = near and not any(low + _SAME < level < high - _SAME for level in levels)
            if near:
                return True
        return False


def natural(along: str, value: float) -> float:
    """A point's value in its natural unit: a rate, or a share."""
    return math.exp(value) if along in RATES else value


def _levels(values: Sequence[float]) -> list[float]:
    levels: list[float] = []
    for value in sorted(values):
        if not levels or value - levels[-1] > _SAME:
            levels.append(value)
    return levels


def _close(one: Point, other: Point) -> bool:
    return one.kind == other.kind and all(abs(value - other.values[along]) <= _SAME for along, value in one.values.items())
