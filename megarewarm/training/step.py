"""One optimizer step: batch, loss and gradients, judgement, update."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from megarewarm.parallel.agreement import all_reduce_sums
from megarewarm.training.run import Run

Kind = Literal["transient", "non_finite", "spike"]


class TrainingDiverged(Exception):
    """The loss or the gradient is not a finite number any more, or spikes without end; nothing of that step was saved."""


@dataclass(frozen=True)
class StepResult:
    """What became of a step: mean ``loss`` per target and gradient ``norm`` before clipping, the same on all ranks.

    ``fault``: what was wrong with it, in ``words``; ``changed``: whether it changed the weights. An overflow in fp16 is no
    fault. ``busy``: seconds that each rank worked, from asking for its batch to the end of its backward pass.
    """

    loss: float
    norm: float
    changed: bool = True
    fault: Kind | None = None
    words: str = ""
    busy: list[float] = field(default_factory=list)


def training_step(run: Run, lr: float) -> StepResult:
    """One optimizer step on the next global batch, at learning rate ``lr``.

    The loss of every micro-batch is a sum divided by the targets of the whole global batch, so gradients add up to those of one
    large batch, whatever the micro-batches and ranks. In fp16 a step whose gradients overflow changes nothing but the loss
    scale.

    A loss or gradient that is not finite is computed once more from the same batch: a fault of the hardware does not come
    again, one of the data or the weights does. ``reliability`` says what follows then, and after a spike; all ranks do the
    same. Where ``run.between`` breaks the step off, nothing but its batch and its gradients is lost.
    """
    config, scaler = run.plan.config, run.scaler
    began = Clock(run.ranks.device)
    waiting = time.perf_counter()
    first_sample, rows = next(run.batches)
    run.waited += time.perf_counter() - waiting
    assert first_sample == run.plan.samples(run.step), "the loader and the step counter have parted; please report this"
    fault: Kind | None = None
    words = ""
    scale = scaler.scale if scaler is not None else 1.0
    loss, norm, busy = compute_gradients(run, rows, began)
    if not _usable(run, loss, norm):
        first = _measured(loss, norm)
        loss, norm, busy = compute_gradients(run, rows, began)
        if not _usable(run, loss, norm):
            which = "gradient" if math.isfinite(loss) else "loss"
            again = "the same" if _measured(loss, norm) == first else _measured(loss, norm)
            words = f"the {which} is not finite ({first}; computed once more: {again})"
            return StepResult(loss, norm, changed=False, fault="non_finite", words=words, busy=busy)
        fault = "transient"
        words = f"{first} at first, {_measured(loss, norm)} computed once more: a fault of the hardware that left no trace"
    if scaler is not None:
        scaler.update(math.isfinite(norm))
        if not math.isfinite(norm):
            return StepResult(loss, norm, changed=False, fault=fault, words=words, busy=busy)
    changed = True
    if run.spikes is not None:
        if (leap := run.spikes.judge(loss, norm)) is not None:
            fault, words = "spike", leap
            changed = config.reliability.spikes == "warn"
        run.spikes.add(loss, norm)
    if changed:
        limit = config.optimizer.clip_norm
        factor = limit / (norm + 1e-6) if limit is not None and norm > limit else 1.0
        run.optimizer.step(lr, run.model.gradients, factor / scale)
    return StepResult(loss, norm, changed, fault, words, busy)


def compute_gradients(run: Run, rows: npt.NDArray[np.int64], clock: Clock) -> tuple[float, float, list[float]]:
    """(mean loss, gradient norm, seconds of each rank) of a global batch, of which ``rows`` are this rank's.

    The gradients, still scaled, are in ``run.model.gradients``. ``clock``: of this rank's work.
    """
    gradients, ranks = run.model.gradients, run.ranks
    scale = run.scaler.scale if run.scaler is not None else 1.0
    gradients.zero()
    loss_sum, targets = run.model.forward_backward(rows, loss_scale=scale, between=run.between)
    clock.stop()
    ranks.report(run.step + 1)
    gradients.reduce()
    norm = gradients.norm() / scale
    times = [0.0] * ranks.world_size
    times[ranks.rank] = clock.seconds()
    loss_sum, targets, distilled, *busy = all_reduce_sums([loss_sum, targets, run.model.distilled, *times])
    run.distilled = distilled / targets if targets else math.nan
    return loss_sum / targets if targets else math.nan, norm, busy


def _usable(run: Run, loss: float, norm: float) -> bool:
    return math.isfinite(loss) and (math.isfinite(norm) or (run.scaler is not None and run.scaler.adapts))


def _measured(loss: float, norm: float) -> str:
    return f"loss {loss:.6g}, gradient norm {norm:.6g}"


class Clock:
    """Seconds that this rank works: on a GPU, whose work is only queued by the host, those of the device."""

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

    def seconds(self) -> float:
        """The time between, once the device has come there."""
        if self._events:
            return self._events[0].elapsed_time(self._events[1]) / 1000
        return self._ended - self._began
