"""A learning-rate schedule with every length settled in steps, stored whole in a checkpoint; and the table of all curves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from megarewarm.errors import UserError
from megarewarm.schedules import curves
from megarewarm.schedules.curves import Values

# Lengths given as percentages add up to the whole only within rounding: less than this share of it is nothing.
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The learning rate as a pure function of the position n, the number of optimizer steps completed.

    All lengths are in steps and need not be whole. Keys that the curve has no use for are ``None``. Past ``length`` the
    rate stays at its last value, which is ``min_lr`` for every curve that reaches it; an ``unclamped`` one goes on.
    """

    curve: str
    max_lr: float
    warmup_steps: float
    length: float
    min_lr: float | None = None
    decay: float | None = None
    decay_shape: str | None = None
    constant_lr: float | None = None
    cooldown: float | None = None
    constant: float | None = None
    timescale: float | None = None
    unclamped: bool | None = None

    def __post_init__(self) -> None:
        """Raise UserError for an unknown curve, a missing key, or phases that don't fit into the length."""
        _check_lengths(self)
        self.values(self.length)

    def lr(self, n: float) -> float:
        """The rate for the update after ``n`` completed steps. Raises ValueError for a negative ``n``."""
        return float(self.values(n))

    def values(self, n: ArrayLike) -> Values:
        """``lr`` of many positions at once: any shape of numbers >= 0 to float64 rates of the same shape."""
        n = np.asarray(n, dtype=np.float64)
        if np.any(n < 0):
            raise ValueError("a schedule has no position before its first step")
        rates = self._curve.rate(self, n if self.unclamped else np.minimum(n, self.length))
        if self.unclamped and self.min_lr is not None:
            rates = np.maximum(self.min_lr, rates)
        if self.warmup_steps > 0:
            rising = (n <= self.warmup_steps) & (bool(self.unclamped) | (n < self.length))
            rates = np.where(rising, curves.warmup(n, self.max_lr, self.warmup_steps, not self.unclamped), rates)
        return rates

    def phases(self) -> list[tuple[str, float, float]]:
        """Name, first position and end (exclusive; inf for the last) of every phase that is not empty, in order. The first
        is 'warmup', the others the curve's own."""
        starts = [("warmup", 0.0), *self._curve.phases(self)]
        ends = [*(start for _, start in starts[1:]), np.inf]
        return [(name, start, stop) for (name, start), stop in zip(starts, ends, strict=True) if stop > start]

    def phase(self, n: float) -> str:
        """Name of the phase that position ``n`` lies in; a joint belongs to the later one."""
        if n < 0:
            raise ValueError("a schedule has no position before its first step")
        return next(name for name, start, stop in self.phases() if start <= n < stop)

    def spec(self) -> dict[str, Any]:
        """Everything that determines the curve, as JSON values; ``from_spec`` gives the equal schedule back."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Schedule:
        """The schedule that ``spec()`` described. Raises UserError if it doesn't describe one."""
        known = {field.name for field in dataclasses.fields(cls)}
        needed = {"curve", "max_lr", "warmup_steps", "length"}
        if unknown := sorted(set(spec) - known):
            raise UserError(f"stored schedule: unknown key '{unknown[0]}': written by another version of megarewarm")
        if missing := sorted(needed - set(spec)):
            raise UserError(f"stored schedule: key '{missing[0]}' is missing: set start.schedule to 'restart'")
        return cls(**spec)

    def get(self, key: str) -> Any:
        """The value of ``key``, or the curve's default. Raises UserError if there is neither."""
        value = getattr(self, key)
        value = self._curve.defaults.get(key) if value is None else value
        if value is None:
            raise UserError(f"schedule.{key} is missing: curve '{self.curve}' needs it")
        return value

    def progress(self, n: Values) -> Values:
        """u at positions ``n``: from 0 at the end of the warmup to 1 at ``length``; ``unclamped``, it goes on past 1. A
        warmup as long as the whole leaves nothing to decay over, and GPT-NeoX divides by zero; we stay at the peak."""
        span = self.length - self.warmup_steps
        if not self.unclamped:
            return curves.progress(n, self.warmup_steps, span)
        return (n - self.warmup_steps) / span if span != 0 else np.zeros_like(n)

    @property
    def _curve(self) -> RateCurve:
        if self.curve not in CURVES:
            raise UserError(f"schedule.curve '{self.curve}' is unknown")
        return CURVES[self.curve]


def _whole(schedule: Schedule) -> str:
    return f"schedule.length (null: training.budget), {schedule.length:g} steps"


def _check_lengths(schedule: Schedule) -> None:
    """Raise UserError unless the phases fit into the length, each in its place."""
    length = schedule.length
    if not length > 0:
        raise UserError(f"schedule.length is {length:g} steps: it must be above 0")
    if schedule.unclamped:
        if "unclamped" not in schedule._curve.may:
            raise UserError(f"schedule.unclamped: curve '{schedule.curve}' has no formula past its length: remove it")
        return
    parts = {"warmup": schedule.warmup_steps}
    for key in ("cooldown", "constant", "decay"):
        if (steps := getattr(schedule, key)) is not None:
            parts[key] = steps
    if sum(parts.values()) > length * (1 + _ROUNDING):
        told = " + ".join(f"schedule.{key} ({steps:g} steps)" for key, steps in parts.items())
        fit = "doesn't fit" if len(parts) == 1 else "don't fit"
        raise UserError(f"{told} {fit} into {_whole(schedule)}: shorten the phases or lengthen the whole")


@dataclasses.dataclass(frozen=True)
class RateCurve:
    """All that is known of a curve; the schema of ``schedule``, its documents and the gallery ask it.

    ``rate``: learning rates after the warmup at positions n (float64, any shape), which are at most ``length`` unless the
    schedule is ``unclamped``; raises UserError for lengths that can't be. ``needs`` and ``may``: keys of ``ScheduleConfig``
    that it must and may have, beside those of all curves; ``defaults`` of these. ``phases``: name and start of each after the
    warmup. ``anneals``: exponentially, so that min_lr must be above 0. ``example``: keys of the gallery's panel.
    """

    rate: Callable[[Schedule, Values], Values]
    needs: tuple[str, ...] = ("min_lr",)
    may: tuple[str, ...] = ("length",)
    phases: Callable[[Schedule], list[tuple[str, float]]] = lambda s: [("decay", s.warmup_steps), ("after", s.length)]
    anneals: bool = False
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    example: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"min_lr": 0.1, "length": "90%"})


def decay(formula: Callable[[Values, float, float], Values], *may: str) -> RateCurve:
    """A curve that is one function of (u, max_lr, min_lr) after the warmup."""
    return RateCurve(lambda s, n: formula(s.progress(n), s.max_lr, s.get("min_lr")), may=("length", *may))


def _cosine_clipped(s: Schedule, n: Values) -> Values:
    if 2 * s.warmup_steps > s.length:
        raise UserError(
            f"schedule.warmup ({s.warmup_steps:g} steps) is above half of {_whole(s)}, where curve 'cosine_clipped' jumps: "
            "shorten it, or use curve 'cosine'"
        )
    return curves.cosine_clipped(n, s.max_lr, s.get("min_lr"), s.warmup_steps, s.length)


def _wsd(s: Schedule, n: Values) -> Values:
    if not s.get("decay"):
        raise UserError("schedule.decay is 0 steps: give the final decay a length, or use curve 'constant'")
    u = curves.progress(n, s.length - s.get("decay"), s.get("decay"))
    return curves.WSD_DECAYS[s.get("decay_shape")](u, s.max_lr, s.get("min_lr"))


def _joints(s: Schedule) -> tuple[float, float]:
    """Positions at which the constant phase and the anneal begin; the second is ``length`` without an anneal."""
    constant = s.warmup_steps + s.get("cooldown")
    anneal = constant + s.get("constant")
    return constant, s.length if s.length - anneal <= _ROUNDING * s.length else anneal


def _infinite(cooldown: Callable[[Schedule, Values], Values], **defaults: float) -> RateCurve:
    """``cooldown`` (of its own progress), constant and anneal of arXiv 2403.08763, section 7."""

    def rate(s: Schedule, n: Values) -> Values:
        constant, anneal = _joints(s)
        height, low = s.get("constant_lr"), s.get("min_lr")
        rates = cooldown(s, curves.progress(n, s.warmup_steps, s.get("cooldown")))
        rates = np.where(n >= constant, height, rates)
        if anneal == s.length:
            return rates
        return np.where(n >= anneal, curves.anneal(curves.progress(n, anneal, s.length - anneal), height, low), rates)

    def phases(s: Schedule) -> list[tuple[str, float]]:
        constant, anneal = _joints(s)
        last = [("anneal", anneal), ("after", s.length)] if anneal < s.length else []
        return [("cooldown", s.warmup_steps), ("constant", constant), *last]

    return RateCurve(
        rate,
        needs=("min_lr", "constant_lr", "cooldown", "constant"),
        may=("length", *defaults),
        phases=phases,
        anneals=True,
        defaults=defaults,
        example={"min_lr": 0.1, "constant_lr": 0.55, "cooldown": "50%", "constant": "25%"},
    )


CURVES: dict[str, RateCurve] = {
    "constant": RateCurve(
        lambda s, n: np.full_like(n, s.max_lr), (), ("unclamped",), lambda s: [("constant", s.warmup_steps)], example={}
    ),
    "linear": decay(curves.linear),
    "linear_clipped": decay(curves.linear_clipped, "unclamped"),
    "cosine": decay(curves.cosine, "unclamped"),
    "cosine_clipped": RateCurve(_cosine_clipped),
    "exponential": decay(curves.exponential, "unclamped"),
    "inverse_sqrt": RateCurve(
        lambda s, n: curves.inverse_sqrt(n, s.max_lr, s.get("min_lr"), s.warmup_steps), may=(), example={"min_lr": 0.1}
    ),
    "wsd": RateCurve(
        _wsd,
        needs=("min_lr", "decay"),
        may=("length", "decay_shape"),
        phases=lambda s: [("stable", s.warmup_steps), ("decay", s.length - s.get("decay")), ("after", s.length)],
        defaults={"decay_shape": "minus_sqrt"},
        example={"min_lr": 0.1, "length": "90%", "decay": "30%"},
    ),
    "infinite_cosine": _infinite(lambda s, u: curves.cosine(u, s.max_lr, s.get("constant_lr"))),
    "infinite_inverse_sqrt": _infinite(
        lambda s, u: curves.inverse_sqrt_cooldown(u, s.max_lr, s.get("constant_lr"), s.get("timescale")), timescale=10.0
    ),
}
"""Every curve there is, by the name that ``schedule.curve`` gives it."""
