"""After which steps a run evaluates."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megarewarm.config.execution import EvaluationConfig
from megarewarm.config.schema import RunConfig


def evaluation_steps(config: RunConfig, first: int, warmup_end: float) -> Iterator[int]:
    """The steps after which the validation sets are evaluated, ascending, the last step always among them.

    ``first`` is the run's first step minus one; during the warmup (until step ``warmup_end``) ``every_in_warmup`` holds.
    Fixed windows are evaluated at every save as well, where the best checkpoint is to be kept. Moving windows are evaluated at
    multiples of ``every`` only, whatever the first step, for that is what numbers their slices.
    """
    settings: EvaluationConfig = config.evaluation
    total = config.total_steps
    if settings.at_start:
        yield first
    every = config.grid(settings.every)
    in_warmup = config.grid(settings.every_in_warmup) if settings.every_in_warmup is not None else every
    zero = 0 if settings.windows == "moving" else first
    steps = {zero + point for point in every.points(total - zero) if zero + point > warmup_end}
    steps |= {zero + point for point in in_warmup.points(min(total, math.floor(warmup_end)) - zero)}
    if config.checkpoint.keep_best is not None and config.checkpoint.every is not None and settings.windows == "fixed":
        steps |= set(config.grid(config.checkpoint.every).points(total))
    yield from sorted({step for step in steps if step > first} | {total})


def task_steps(config: RunConfig, first: int) -> list[int]:
    """The steps after which a run that begins after step ``first`` is tested on ``evaluation.tasks``, ascending."""
    if not config.evaluation.tasks:
        return []
    points = config.grid(config.evaluation.tasks_every).points(config.total_steps - first)
    return sorted({first, *(first + point for point in points), config.total_steps})


def evaluations_at(config: RunConfig, step: int) -> list[tuple[int, bool]]:
    """The evaluations after ``step``: the number of each, and whether it is the run's last.

    Fixed windows have one, whose number means nothing. Moving windows have one at every multiple of ``every`` and then
    one more at the end, on the next slice; so GPT-NeoX evaluates twice where the last step is such a multiple.
    """
    if config.evaluation.windows == "fixed":
        return [(0, step == config.total_steps)]
    every = config.grid(config.evaluation.every)
    number = every.number(step)
    regular = [(number - 1, False)] if number is not None else []
    return regular + ([(every.count(config.total_steps), True)] if step == config.total_steps else [])
