"""What the rows of a global batch do to validation losses in the step that is about to be made.

The first order of In-Run Data Shapley (arXiv 2406.11011) with Adam's preconditioner P of this very step and its clip factor c:
with g_val the gradient of a set's mean loss and g_i a row's part of the batch's gradient, a row is worth lr <P (1 - b1) c o
g_val, g_i>, the derivative of the row's loss along u = P (1 - b1) c o g_val. Two forward passes give it for all rows. Momentum
and weight decay have their own shares. Positive: the loss falls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megarewarm.data.mixture.validation import Slice
from megarewarm.parallel.agreement import all_reduce_sums
from megarewarm.parallel.collective import collective
from megarewarm.parallel.direction import row_derivatives
from megarewarm.training.run import Run, Update


@dataclass(frozen=True)
class StepValue:
    """What a step does to one validation set's loss, in nats per token, before it is made.

    ``rows``: of each valued row, per unit of learning rate. ``samples``, ``momentum``, ``decay``: the shares of all of the
    batch, of the momentum and of the weight decay in this step. ``loss``: the set's before the step, over ``targets``.
    """

    rows: list[float]
    samples: float
    momentum: float
    decay: float
    loss: float
    targets: float

    @property
    def predicted(self) -> float:
        """By how much the loss falls in the step, to first order."""
        return self.samples + self.momentum + self.decay


@collective
def value_step(run: Run, update: Update, sets: Sequence[Slice], chosen: Sequence[int]) -> list[StepValue | None]:
    """The values of the rows ``chosen`` of ``update``'s global batch against each of ``sets``; None where a set's gradient is
    not finite (in fp16). All ranks call it between the gradients and the update; weights and gradients are afterwards what
    they were, bit for bit."""
    taken = run.model.gradients.take()
    try:
        return [_value(run, update, windows, chosen, taken) for windows in sets]
    finally:
        run.model.gradients.zero()
        run.model.gradients.put_back(taken)


@collective
def mean_loss(run: Run, windows: Slice) -> tuple[float, float]:
    """(mean loss in nats per token, tokens) of a set's rows, in fp32. All ranks call it."""
    rows, most = _rows_of(run, windows)
    losses = run.model.row_losses(rows, most, run.model.micro_batch, taught=False)
    total, targets = all_reduce_sums([math.fsum(losses), run.model.count_targets(rows)])
    return total / targets if targets else math.nan, targets


def carried_rate(run: Run, lr: float) -> float:
    """The learning rate at which a row of the next step, whose rate is ``lr``, has moved the weights at the end of the run,
    relative to its coefficient in that step: momentum carries it on with b1^k in the k-th step after it, at that step's rate
    and bias correction. At a constant rate it is lr / (1 - b1)."""
    beta, count = run.plan.config.optimizer.betas[0], run.optimizer.completed_steps + 1
    total = lr
    for k, step in enumerate(range(run.step + 2, run.plan.config.total_steps + 1), 1):
        weight = beta**k * (1 - beta**count) / (1 - beta ** (count + k))
        if weight < 1e-4:
            break
        total += weight * run.plan.lr(step)
    return total


def _value(run: Run, update: Update, windows: Slice, chosen: Sequence[int], taken: dict[str, Tensor]) -> StepValue | None:
    model, scale = run.model, 1.0 if run.scaler is None else run.scaler.scale
    model.gradients.zero()
    model.gradients.expect_reduce()
    rows, most = _rows_of(run, windows)
    losses = model.add_mean_gradients(rows, most, scale)
    model.gradients.reduce()
    if scale != 1.0:
        model.gradients.scale_(1 / scale)
    if not math.isfinite(model.gradients.norm()):
        return None
    total = torch.zeros(4, dtype=torch.float64, device=model.mesh.device)
    for name, parameter in model.trained.items():
        assert parameter.grad is not None
        sums = run.optimizer.influence(name, taken[name], update.scale, update.clip, parameter.grad)
        if model.unique_trained(name, parameter) is not None:
            total += sums
    summed, targets, samples, momentum, decay, steepness = all_reduce_sums([losses.sum, losses.targets, *total.tolist()])
    loss = summed / targets if run.inputs.precision == "fp32" else mean_loss(run, windows)[0]
    return StepValue(
        rows=_derivatives(run, update, chosen, steepness),
        samples=samples * update.lr,
        momentum=momentum * update.lr,
        decay=decay * update.lr,
        loss=loss,
        targets=targets,
    )


def _derivatives(run: Run, update: Update, chosen: Sequence[int], steepness: float) -> list[float]:
    """The derivatives of the loss of the global batch along the direction in the gradients, of each row that is ``chosen``."""
    size, ranks = len(update.rows), run.mesh.layout.data
    mine = range(run.mesh.data_rank * size, (run.mesh.data_rank + 1) * size)
    places = [place for place, row in enumerate(chosen) if row in mine]
    most = max(sum(rank * size <= row < (rank + 1) * size for row in chosen) for rank in range(ranks))
    rows = update.rows[[chosen[place] - mine.start for place in places]]
    found = row_derivatives(run.model, rows, most, run.model.micro_batch, steepness)
    each = [0.0] * len(chosen)
    for place, value in zip(places, found, strict=True):
        each[place] = value / run.model.targets_per_step
    return all_reduce_sums(each)


def _rows_of(run: Run, windows: Slice) -> tuple[npt.NDArray[np.int64], int]:
    """This rank's rows of a set, (n, s + 1), and the largest n of any rank."""
    rank, ranks = run.mesh.data_rank, run.mesh.layout.data
    parts = list(windows.micro_batches(rank, ranks, run.model.micro_batch))
    length = run.plan.config.data.sequence_length + 1
    rows = np.concatenate(parts) if parts else np.empty((0, length), np.int64)
    return rows, max(len(windows.share(other, ranks)) for other in range(ranks))
