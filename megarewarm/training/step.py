"""One optimizer step: batch, loss and gradients, check, update.

On a GPU with the fused AdamW the check is the device's: it computes norm, clip factor and whether both loss and norm are
finite, and the update, queued behind them, changes nothing where they are not. The host reads them while the update runs, and
goes on as everywhere else. Steps whose update may be stopped by something else wait for the host: see ``_is_guarded``.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from megarewarm.parallel.agreement import all_reduce_sums
from megarewarm.parallel.batch_losses import BatchLosses
from megarewarm.parallel.collective import collective
from megarewarm.training.run import Run, Update

Kind = Literal["transient", "non_finite", "spike"]


class TrainingDiverged(Exception):
    """The loss or the gradient is not finite any more, or spikes don't end; nothing of that step was saved."""


@dataclass(frozen=True)
class StepResult:
    """What became of a step: mean ``loss`` per target and gradient ``norm`` before clipping, the same on all ranks.

    ``fault``: what was wrong with it, in ``words``; ``changed``: whether it changed the weights. An overflow in fp16 is no
    fault. ``distilled``: the teacher's term, a mean per target. ``busy``: seconds that each rank worked, from asking for its
    batch to the end of its backward pass; ``waited``: that this rank waited for its batch. ``row_losses``: the loss of each
    sequence of the global batch, summed over its targets in nats, where ``run.wants_row_losses``. ``aside``: seconds that
    ``run.before_update`` took.
    """

    loss: float
    norm: float
    changed: bool = True
    fault: Kind | None = None
    words: str = ""
    distilled: float = 0.0
    busy: list[float] = field(default_factory=list)
    waited: float = 0.0
    aside: float = 0.0
    row_losses: list[float] | None = None


@collective
def training_step(run: Run, lr: float) -> StepResult:
    """One optimizer step on the next global batch, at learning rate ``lr``. All ranks call it.

    The loss of every micro-batch is a sum divided by the targets of the whole global batch, so gradients add up to those of one
    large batch, whatever the micro-batches and ranks. In fp16 a step whose gradients overflow changes nothing but the loss
    scale.

    A loss or gradient that is not finite is recomputed from the same batch: a transient hardware fault does not recur, a fault
    of the data or the weights does. ``reliability`` configures what happens then, and after a spike; all ranks do the same.
    If ``run.between`` interrupts the step, only its batch and its gradients are lost.
    """
    clock = Clock(run.ranks.device)
    waiting = time.perf_counter()
    first_sample, rows = next(run.batches)
    waited = time.perf_counter() - waiting
    assert first_sample == run.plan.samples(run.step), "data loader and step counter are out of sync; please report this"
    guarded = _is_guarded(run)
    result = _gradients_and_update(run, rows, clock, lr) if guarded else compute_gradients(run, rows, clock)
    if guarded and not _usable(run, result):
        run.optimizer.take_back()
        guarded = False
    fault: Kind | None = None
    words = ""
    scale = loss_scale(run)
    if not _usable(run, result):
        first, result = result, compute_gradients(run, rows, clock)
        if _usable(run, result):
            fault = "transient"
            words = f"{_measured(first)} at first, {_measured(result)} when recomputed: transient hardware fault, no effect"
        else:
            which = "gradient" if math.isfinite(result.loss) else "loss"
            again = "the same" if _measured(result) == _measured(first) else _measured(result)
            fault, words = "non_finite", f"the {which} is not finite ({_measured(first)}; recomputed: {again})"
    changed, aside = fault != "non_finite", 0.0
    if changed and run.scaler is not None:
        run.scaler.update(math.isfinite(result.norm))
        changed = math.isfinite(result.norm)
    if changed and run.spikes is not None:
        if (leap := run.spikes.judge(result.loss, result.norm)) is not None:
            fault, words = "spike", leap
            changed = run.plan.config.reliability.spikes == "warn"
        run.spikes.add(result.loss, result.norm)
    if changed and not guarded:
        factor = clip_factor(run, result)
        began = time.perf_counter()
        if run.before_update is not None:
            run.before_update(Update(lr, rows, factor / scale, factor))
        aside = time.perf_counter() - began
        run.optimizer.step(lr, run.model.gradients, factor / scale)
    run.state.complete_step(lr)
    return replace(result, changed=changed, fault=fault, words=words, waited=waited, aside=aside)


@collective
def compute_gradients(run: Run, rows: npt.NDArray[np.int64], clock: Clock) -> StepResult:
    """Losses and gradient norm of a global batch, of which ``rows`` are this rank's. All ranks call it. The gradients, still
    scaled, are in ``run.model.gradients``. ``clock``: of this rank's work."""
    gradients, ranks = run.model.gradients, run.ranks
    losses = _forward_backward(run, rows, clock)
    ranks.report(run.step + 1)
    gradients.reduce()
    norm = gradients.norm() / loss_scale(run)
    times = [0.0] * ranks.world_size
    times[ranks.rank] = clock.seconds()
    each = [0.0] * (len(rows) * run.mesh.layout.data if losses.rows is not None else 0)
    if losses.rows is not None:
        mine = run.mesh.data_rank * len(rows)
        each[mine : mine + len(rows)] = losses.rows
    loss, targets, distilled, *rest = all_reduce_sums([losses.sum, losses.targets, losses.distilled, *times, *each])
    busy, each = rest[: ranks.world_size], rest[ranks.world_size :]
    return StepResult(
        loss / targets if targets else math.nan,
        norm,
        distilled=distilled / targets if targets else math.nan,
        busy=busy,
        row_losses=each if losses.rows is not None else None,
    )


def _forward_backward(run: Run, rows: npt.NDArray[np.int64], clock: Clock) -> BatchLosses:
    run.model.gradients.zero()
    run.model.gradients.expect_reduce()
    losses = run.model.forward_backward(rows, loss_scale=loss_scale(run), between=run.between, per_row=run.wants_row_losses)
    clock.stop()
    return losses


def _is_guarded(run: Run) -> bool:
    """Whether nothing but a loss or norm that is not finite can stop the update, and the device can see to that. Not with
    spikes that must stop it, a loss scale that adapts to overflows, or values of rows, which are measured before it; nor in a
    pipeline, whose losses the host adds up."""
    spikes = run.plan.config.reliability.spikes in ("off", "warn")
    waits = run.scaler is not None or run.before_update is not None or run.wants_row_losses or run.mesh.layout.pipeline > 1
    return run.ranks.device.type in GUARDING and run.optimizer.guarded and spikes and not waits


def _gradients_and_update(run: Run, rows: npt.NDArray[np.int64], clock: Clock, lr: float) -> StepResult:
    """As ``compute_gradients``, with the update from the clipped gradients queued behind them. Where loss or norm is not finite
    it has changed nothing."""
    gradients, limit = run.model.gradients, run.plan.config.optimizer.clip_norm
    losses = _forward_backward(run, rows, clock)
    gradients.reduce()
    sums = torch.cat([losses.totals, losses.totals.new_full((1,), losses.targets)])
    if run.ranks.world_size > 1:
        dist.all_reduce(sums)
    squares = gradients.squares()
    norm, loss = squares.sqrt(), sums[0] / sums[2]
    told = Told(torch.cat([sums, squares.view(1)]))
    run.optimizer.step(lr, gradients, guarded_scale(loss, norm, limit))
    clock.wait()
    run.ranks.report(run.step + 1)
    total, distilled, targets, square = told.read()
    targets = losses.targets if run.ranks.world_size == 1 else targets
    times = [0.0] * run.ranks.world_size
    times[run.ranks.rank] = clock.seconds()
    return StepResult(
        total / targets if targets else math.nan,
        math.sqrt(square),
        distilled=distilled / targets if targets else math.nan,
        busy=all_reduce_sums(times),
    )


def guarded_scale(loss: torch.Tensor, norm: torch.Tensor, limit: float | None) -> torch.Tensor:
    """By what gradients of ``norm`` are multiplied so that it is at most ``limit``, () fp32 as ``Optimizer.step`` takes it: NaN
    where loss or norm is not finite."""
    factor = torch.ones_like(norm) if limit is None else torch.where(norm > limit, limit / (norm + 1e-6), 1.0)
    return torch.add(factor, loss + norm, alpha=0).float()  # 0 x inf is NaN, and few launches lie between norm and update


GUARDING = ("cuda",)
"""Types of devices on which the host is worth not waiting for."""


class Told:
    """Numbers on their way from the device, behind what has been queued so far."""

    def __init__(self, values: torch.Tensor) -> None:
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        self._host.copy_(values, non_blocking=True)
        self._there = torch.cuda.Event() if values.is_cuda else None
        if self._there is not None:
            self._there.record()

    def read(self) -> list[float]:
        """The numbers, once they are here."""
        if self._there is not None:
            self._there.synchronize()
        found: list[float] = self._host.tolist()
        return found


def clip_factor(run: Run, result: StepResult) -> float:
    """By what the gradients of ``result`` are multiplied so that their norm is at most ``optimizer.clip_norm``."""
    limit = run.plan.config.optimizer.clip_norm
    return limit / (result.norm + 1e-6) if limit is not None and result.norm > limit else 1.0


def loss_scale(run: Run) -> float:
    """By what the gradients that are computed next are too large."""
    return run.scaler.scale if run.scaler is not None else 1.0


def _usable(run: Run, result: StepResult) -> bool:
    return math.isfinite(result.loss) and (math.isfinite(result.norm) or (run.scaler is not None and run.scaler.adapts))


def _measured(result: StepResult) -> str:
    return f"loss {result.loss:.6g}, gradient norm {result.norm:.6g}"


class Clock:
    """Seconds that this rank works: on a GPU device time, because the host only queues work."""

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._began = self._ended = time.perf_counter()
        if self._events:
            self._events[0].record()

    def stop(self) -> None:
        """The work is done, or queued."""
        self._ended = time.perf_counter()
        if self._events:
            self._events[1].record()

    def wait(self) -> None:
        """Until the work is done."""
        if self._events:
            self._events[1].synchronize()

    def seconds(self) -> float:
        """The time between, when the device has reached this point."""
        if self._events:
            return self._events[0].elapsed_time(self._events[1]) / 1000
        return self._ended - self._began
