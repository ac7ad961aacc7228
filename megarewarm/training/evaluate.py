"""Validation losses: every named set on the same tokens each time, weighted by tokens, equal for any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megarewarm.config.execution import EvaluationConfig
from megarewarm.config.schema import RunConfig
from megarewarm.data.mixture import open_view
from megarewarm.data.moving import MovingWindows
from megarewarm.data.validation import ValidationWindows
from megarewarm.parallel.agreement import Between, all_reduce_sums, nothing_between
from megarewarm.parallel.engine import ParallelModel
from megarewarm.parallel.mesh import Mesh


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


def turns(config: RunConfig, step: int) -> list[tuple[int, bool]]:
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


def open_validation(config: RunConfig, vocab_size: int) -> tuple[list[ValidationWindows | MovingWindows], list[str]]:
    """The validation sets of a run, and notes on those that are left out, or hold less than is asked for. Raises ``UserError``.

    A moving set whose split gives it no documents is left out, as GPT-NeoX does: its default split of 969, 30, 1 leaves
    small files without a test set.
    """
    data = config.data
    if config.evaluation.windows == "fixed":
        fixed = [ValidationWindows(item, data, vocab_size) for item in data.validation]
        return [*fixed], [note for windows in fixed for note in windows.notes]
    evaluations = config.grid(config.evaluation.every).count(config.total_steps) + 1
    sets: list[ValidationWindows | MovingWindows] = []
    notes = []
    for item in data.validation:
        empty = [source for source in item.sources if open_view(source, data, vocab_size).num_documents == 0]
        if empty:
            where = f"split '{empty[0].split}' gives its part of {empty[0].path} no documents"
            notes.append(f"validation set '{item.name}' is left out: {where}")
        else:
            moving = MovingWindows(item, data, vocab_size, evaluations)
            sets.append(moving)
            notes += moving.notes
    return sets, notes


class Windows(Protocol):
    """The windows of one evaluation of one set."""

    def share(self, rank: int, world: int) -> range: ...

    def micro_batches(self, rank: int, world: int, micro_batch: int) -> Iterator[npt.NDArray[np.int64]]: ...


def evaluate(
    model: ParallelModel, windows: Windows, micro_batch: int, mesh: Mesh, between: Between = nothing_between
) -> tuple[float, int]:
    """Mean loss in nats per token over all windows of a set, and the number of tokens it is the mean of."""
    ranks = mesh.layout.data
    rows = windows.micro_batches(mesh.data_rank, ranks, micro_batch)
    most = max(len(windows.share(rank, ranks)) for rank in range(ranks))
    total, count = all_reduce_sums(model.evaluate(rows, most, micro_batch, between))
    return total / count if count else math.nan, int(count)
