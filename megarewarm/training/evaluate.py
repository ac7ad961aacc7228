"""Validation losses: every named set on the same tokens each time, weighted by tokens, equal for any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from megarewarm.config.budget import Budget
from megarewarm.config.schema import EvaluationConfig, RunConfig
from megarewarm.data.validation import ValidationWindows
from megarewarm.model.neox import NeoX
from megarewarm.parallel.data import all_reduce_sums
from megarewarm.parallel.mesh import Ranks


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


@torch.no_grad()
def evaluate(
    model: NeoX, windows: ValidationWindows, micro_batch: int, ranks: Ranks, autocast: torch.autocast
) -> tuple[float, int]:
    """Mean loss in nats per token over all windows of a set, and the number of tokens it is the mean of."""
    model.eval()
    total, count = 0.0, 0.0
    for rows in windows.micro_batches(ranks.rank, ranks.world_size, micro_batch):
        tokens = torch.from_numpy(rows).to(ranks.device)
        with autocast:
            loss, targets = model.loss(tokens[:, :-1], tokens[:, 1:])
        total += float(loss)
        count += float(targets)
    total, count = all_reduce_sums([total, count])
    model.train()
    return total / count if count else math.nan, int(count)
