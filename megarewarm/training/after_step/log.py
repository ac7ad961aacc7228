"""The line of metrics.jsonl that every step has, and the line on the console."""

from __future__ import annotations

import torch

from megarewarm.model.size import peak_tflops, training_flops_per_token
from megarewarm.record.events import TrainEvent
from megarewarm.training.after_step.part import Context, Moment, Stateless
from megarewarm.training.run import Run


class Log(Stateless):
    """Writes the event 'train'."""

    def __init__(self, context: Context) -> None:
        self._run, self._metrics = context.run, context.metrics
        self._sums = context.run.plan.learning_rate_sums()

    def after(self, moment: Moment) -> None:
        if moment.result is None:
            return
        run, result = self._run, moment.result
        plan, step = run.plan, run.step
        rate = plan.config.tokens_per_step / moment.seconds
        lr_sum, area = (float(column[step - plan.origin.step - 1]) for column in self._sums)
        event = TrainEvent(
            step=step,
            tokens=plan.tokens(step),
            loss=result.loss,
            lr=run.state.last_lr,
            lr_sum=lr_sum,
            annealing_area=area,
            grad_norm=result.norm,
            tokens_per_second=round(rate, 1),
            data_wait=round(result.waited, 4),
            distill_loss=result.distilled if run.model.teacher is not None else None,
            mfu=_utilisation(run, rate),
            changed=result.changed,
        )
        self._metrics.event("train", **event.values())


class Show(Stateless):
    """Shows the step on the console, and in log.txt where a line is due."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def after(self, moment: Moment) -> None:
        if moment.result is None:
            return
        run = self._context.run
        rate = run.plan.config.tokens_per_step / moment.seconds
        logged = self._context.progress.step(run.step, moment.result.loss, run.state.last_lr, rate)
        if logged is not None:
            self._context.metrics.text(logged)


def _utilisation(run: Run, tokens_per_second: float) -> float | None:
    """Model FLOPs utilisation (causal-attention FLOPs of forward and backward), ``None`` where the device's peak is unknown."""
    device, plan = run.ranks.device, run.plan
    peak = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak is None:
        return None
    flops = training_flops_per_token(plan.model, plan.config.data.sequence_length) * tokens_per_second
    return round(flops / (peak * 1e12 * run.ranks.world_size), 4)
