"""Validation losses: every named set on the same tokens each time, weighted by tokens, equal for any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megarewarm.config.budget import Budget
from megarewarm.config.execution import EvaluationConfig
from megarewarm.config.schema import RunConfig
from megarewarm.data.validation import ValidationWindows
from megarewarm.parallel.agreement import all_reduce_sums
from megarewarm.parallel.engine import ParallelModel
from megarewarm.parallel.mesh import Mesh


def evaluation_steps(config: RunConfig, first: int, warmup_end: float) -> Iterator[int]:
    """The steps after which the validation sets are evaluated, ascending, the last step always among them.

    ``first`` is the run's first step minus one; during the warmup (until step ``warmup_end``) ``every_in_warmup`` holds.
    """
    settings: EvaluationConfig = config.evaluation
    total = config.total_steps
    if settings.at_start:
        yield first
    every = _interval(config, settings.every)
    in_warmup = _interval(config, settings.every_in_warmup) if settings.every_in_warmup is not None else every
    for step in range(first + 1, total + 1):
        interval = in_warmup if step <= warmup_end else every
        if (step - first) % interval == 0 or step == total:
            yield step


def _interval(config: RunConfig, budget: Budget) -> int:
    return max(1, round(config.steps(budget)))


def evaluate(model: ParallelModel, windows: ValidationWindows, micro_batch: int, mesh: Mesh) -> tuple[float, int]:
    """Mean loss in nats per token over all windows of a set, and the number of tokens it is the mean of."""
    ranks = mesh.layout.data
    rows = windows.micro_batches(mesh.data_rank, ranks, micro_batch)
    most = max(len(windows.share(rank, ranks)) for rank in range(ranks))
    total, count = all_reduce_sums(model.evaluate(rows, calls=math.ceil(most / micro_batch)))
    return total / count if count else math.nan, int(count)
