"""A learning-rate schedule with every length settled in steps: built from the config, stored whole in a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from megarewarm.config.budget import Budget
from megarewarm.config.schema import ScheduleConfig
from megarewarm.errors import UserError
from megarewarm.schedules import curves
from megarewarm.schedules.curves import Values

UNCLAMPED = ("constant", "cosine", "linear_clipped", "exponential")
"""Curves that GPT-NeoX has, and that may run on past their length as they do there."""

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
        rates = self._neox(n) if self.unclamped else self._after_warmup(np.minimum(n, self.length))
        if self.warmup_steps > 0:
            rising = (n <= self.warmup_steps) & (bool(self.unclamped) | (n < self.length))
            rates = np.where(rising, curves.warmup(n, self.max_lr, self.warmup_steps, not self.unclamped), rates)
        return rates

    def phases(self) -> list[tuple[str, float, float]]:
        """Name, first position and end (exclusive; inf for the last) of every phase that is not empty, in order.

        The names are 'warmup', 'stable', 'decay', 'cooldown', 'constant', 'anneal' and 'after'.
        """
        w, end = self.warmup_steps, self.length
        match self.curve:
            case "constant":
                middle = [("constant", w)]
            case "wsd":
                middle = [("stable", w), ("decay", end - self._get("decay")), ("after", end)]
            case "infinite_cosine" | "infinite_inverse_sqrt":
                constant, anneal = self._infinite_joints()
                middle = [("cooldown", w), ("constant", constant)]
                if anneal < end:
                    middle += [("anneal", anneal), ("after", end)]
            case _:
                middle = [("decay", w), ("after", end)]
        starts = [("warmup", 0.0), *middle]
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
        """The schedule that ``spec()`` described. Raises UserError where it doesn't describe one."""
        known = {field.name for field in dataclasses.fields(cls)}
        needed = {"curve", "max_lr", "warmup_steps", "length"}
        if unknown := sorted(set(spec) - known):
            raise UserError(f"stored schedule: unknown key '{unknown[0]}': written by another version of megarewarm")
        if missing := sorted(needed - set(spec)):
            raise UserError(f"stored schedule: key '{missing[0]}' is missing: set start.schedule to 'restart'")
        return cls(**spec)

    def _after_warmup(self, n: Values) -> Values:
        """The curve without its warmup, at positions already held at or below ``length``."""
        w, end, high = self.warmup_steps, self.length, self.max_lr
        match self.curve:
            case "constant":
                return np.full_like(n, high)
            case "cosine_clipped":
                return curves.cosine_clipped(n, high, self._get("min_lr"), w, end)
            case "inverse_sqrt":
                return curves.inverse_sqrt(n, high, self._get("min_lr"), w)
            case "wsd":
                decay = self._get("decay")
                u = curves.progress(n, end - decay, decay)
                return curves.WSD_DECAYS[self.decay_shape or "minus_sqrt"](u, high, self._get("min_lr"))
            case "infinite_cosine" | "infinite_inverse_sqrt":
                return self._infinite(n)
            case curve if curve in curves.DECAYS:
                return curves.DECAYS[curve](curves.progress(n, w, end - w), high, self._get("min_lr"))
        raise UserError(f"schedule.curve '{self.curve}' is unknown")

    def _neox(self, n: Values) -> Values:
        """GPT-NeoX's formulas after the warmup, at any position: u runs on past 1, only ``min_lr`` is a limit.

        A warmup as long as the whole leaves nothing to decay over, and GPT-NeoX divides by zero; we stay at the peak.
        """
        if self.curve == "constant":
            return np.full_like(n, self.max_lr)
        span = self.length - self.warmup_steps
        u = (n - self.warmup_steps) / span if span != 0 else np.zeros_like(n)
        low = self._get("min_lr")
        return np.maximum(low, curves.DECAYS[self.curve](u, self.max_lr, low))

    def _infinite(self, n: Values) -> Values:
        """Cooldown, constant and anneal of arXiv 2403.08763, section 7."""
        constant, anneal = self._infinite_joints()
        height, low = self._get("constant_lr"), self._get("min_lr")
        u = curves.progress(n, self.warmup_steps, self._get("cooldown"))
        if self.curve == "infinite_cosine":
            rates = curves.cosine(u, self.max_lr, height)
        else:
            rates = curves.inverse_sqrt_cooldown(u, self.max_lr, height, self.timescale or 10.0)
        rates = np.where(n >= constant, height, rates)
        if anneal == self.length:
            return rates
        u = curves.progress(n, anneal, self.length - anneal)
        return np.where(n >= anneal, curves.anneal(u, height, low), rates)

    def _infinite_joints(self) -> tuple[float, float]:
        """Positions at which the constant phase and the anneal begin; the second is ``length`` without an anneal."""
        constant = self.warmup_steps + self._get("cooldown")
        anneal = constant + self._get("constant")
        return constant, self.length if self.length - anneal <= _ROUNDING * self.length else anneal

    def _get(self, key: str) -> float:
        value = getattr(self, key)
        if value is None:
            raise UserError(f"schedule.{key} is missing: curve '{self.curve}' needs it")
        return float(value)


def build_schedule(config: ScheduleConfig, to_steps: Callable[[Budget], float], total_steps: int) -> Schedule:
    """The schedule of a run: ``config`` with every length turned into steps by ``to_steps``.

    ``total_steps`` is the training budget in steps, the length of a curve that gives none. Raises UserError, naming
    the keys, where the phases are longer than the whole.
    """

    def steps(budget: Budget | None) -> float | None:
        return None if budget is None else float(to_steps(budget))

    length = steps(config.length)
    return Schedule(
        curve=config.curve,
        max_lr=config.max_lr,
        warmup_steps=float(to_steps(config.warmup)),
        length=float(total_steps) if length is None else length,
        min_lr=config.min_lr,
        decay=steps(config.decay),
        decay_shape=(config.decay_shape or "minus_sqrt") if config.curve == "wsd" else None,
        constant_lr=config.constant_lr,
        cooldown=steps(config.cooldown),
        constant=steps(config.constant),
        timescale=(config.timescale or 10.0) if config.curve == "infinite_inverse_sqrt" else None,
        unclamped=config.unclamped or None,
    )


def _check_lengths(schedule: Schedule) -> None:
    """Raise UserError unless the phases fit into the length, each in its place."""
    length = schedule.length
    whole = f"schedule.length (null: training.budget), {length:g} steps"
    if not length > 0:
        raise UserError(f"schedule.length is {length:g} steps: it must be above 0")
    if schedule.unclamped:
        if schedule.curve not in UNCLAMPED:
            raise UserError(f"schedule.unclamped: curve '{schedule.curve}' has no formula past its length: remove it")
        return
    parts = {"warmup": schedule.warmup_steps}
    for key in ("cooldown", "constant", "decay"):
        if (steps := getattr(schedule, key)) is not None:
            parts[key] = steps
    if sum(parts.values()) > length * (1 + _ROUNDING):
        told = " + ".join(f"schedule.{key} ({steps:g} steps)" for key, steps in parts.items())
        fit = "doesn't fit" if len(parts) == 1 else "don't fit"
        raise UserError(f"{told} {fit} into {whole}: shorten the phases or lengthen the whole")
    if schedule.curve == "wsd" and not schedule.decay:
        raise UserError("schedule.decay is 0 steps: give the final decay a length, or use curve 'constant'")
    if schedule.curve == "cosine_clipped" and 2 * schedule.warmup_steps > length:
        raise UserError(
            f"schedule.warmup ({schedule.warmup_steps:g} steps) is above half of {whole}, where curve 'cosine_clipped' "
            "jumps: shorten it, or use curve 'cosine'"
        )
