"""The average of a run's last weights that stands for a decay (``checkpoint.average``): of which steps, with which shares,
and the average itself."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from megarewarm.checkpoint.own.store import Tensors
from megarewarm.config.schema import RunConfig
from megarewarm.errors import UserError
from megarewarm.parallel.engine import ParallelModel
from megarewarm.schedules.merging import decay_shares, note_on_rates, within
from megarewarm.training.start.plan import Plan
from megarewarm.training.start.saving import saved_steps


@dataclass(frozen=True)
class Averaging:
    """The ``steps``, ascending, after which the weights are added, and the shape of the decay that they stand for."""

    like: str
    steps: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"{self.like} decay over steps {self.steps[0]:,} to {self.steps[-1]:,} by merging {len(self.steps)} of the run's "
            f"weights"
        )

    def recorded(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {"like": self.like, "steps": list(self.steps)}


def averaging(config: RunConfig, first: int) -> Averaging | None:
    """What ``checkpoint.average`` means for a run whose first step follows ``first``; None without it. Raises ``UserError`` for
    a window that is longer than the run or holds fewer than two sets of weights."""
    settings = config.checkpoint.average
    if settings is None:
        return None
    own = config.total_steps - first
    length = settings.window.in_steps(config.tokens_per_step, own)
    if length > own:
        raise UserError(
            f"checkpoint.average.window {settings.window}: is {length:g} steps, the run has {own:,}; give at most all of them"
        )
    if settings.every is None:
        steps = saved_steps(config, first)
    else:
        steps = sorted({*config.grid(settings.every).between(first, config.total_steps), config.total_steps})
    steps = within(length, steps)
    if len(steps) < 2:
        key = "every" if settings.every is None else "average.every"
        raise UserError(
            f"checkpoint.average: of the last {length:g} steps only the end would be averaged; give a longer window, or a "
            f"shorter checkpoint.{key}"
        )
    return Averaging(settings.like, tuple(steps))


def begun(plan: Plan) -> bool:
    """Whether the run's own checkpoint, from which it is resumed, holds the average as it is configured now."""
    if not plan.resumed:
        return False
    assert plan.source is not None and plan.source.training is not None
    wanted = averaging(plan.config, plan.origin.step)
    return wanted is not None and plan.source.training.recent_steps.model_dump().get("average") == wanted.recorded()


def check_average(plan: Plan) -> None:
    """Raise ``UserError`` if the average can't be what its settings say, because weights that it needs are gone."""
    wanted = averaging(plan.config, plan.origin.step)
    if wanted is None or not plan.resumed or plan.position.step < wanted.steps[0] or begun(plan):
        return
    raise UserError(
        f"checkpoint.average: {plan.config.run_folder} is at step {plan.position.step:,}, within the window of the {wanted}, "
        f"and its checkpoint holds no average with these settings; restore them, or set checkpoint.average to null and "
        f"average what is saved with megarewarm merge --like"
    )


def about_average(plan: Plan) -> list[str]:
    """A note if the average stands for another decay than its shape says, because the rate is not constant in its window."""
    wanted = averaging(plan.config, plan.origin.step)
    if wanted is None:
        return []
    note = note_on_rates(plan.schedule, *(plan.schedule_position(step) for step in (wanted.steps[0], wanted.steps[-1])))
    return [f"checkpoint.average: {note}"] if note else []


class Average:
    """The average so far, a tensor for each parameter and laid out as it is, in fp32 on its device; empty before its first
    step. After step j of the shares c it is sum_(i <= j) c_i theta_i / sum_(i <= j) c_i: the weights of a model at any time,
    and the average itself after the last step (arXiv 2507.17634; ``schedules/merging.py`` has the shares)."""

    def __init__(self, of: Averaging, model: ParallelModel) -> None:
        self.of, self._model = of, model
        shares = decay_shares(of.like, of.steps).tolist()
        self._parts = {
            step: share / total if total > 0 else 1.0
            for step, share, total in zip(of.steps, shares, accumulate(shares), strict=True)
        }
        self.weights: dict[str, Tensor] = {}

    def allocate(self) -> None:
        """Make room for what a checkpoint holds of it."""
        self.weights = {name: torch.empty_like(parameter) for name, parameter in self._model.parameters.items()}

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Add the weights after ``step``, if it is one of those."""
        part = self._parts.get(step)
        if part is None:
            return
        if not self.weights:
            self.weights = {name: parameter.detach().clone() for name, parameter in self._model.parameters.items()}
            return
        for name, parameter in self._model.parameters.items():
            self.weights[name].lerp_(parameter, part)

    def tensors(self, prefix: str = "average") -> Tensors:
        """The average under the names it has in a checkpoint; writing to the tensors changes it."""
        return {f"{prefix}.{name}": self._model.whole(name, tensor) for name, tensor in self.weights.items()}
