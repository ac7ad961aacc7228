"""Validation losses: every named set on the same tokens each time, weighted by tokens, equal for any number of ranks; and tests
on tasks where these are due."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from megarewarm.data.mixture.validation import Slice, WindowSet
from megarewarm.parallel.agreement import Between, all_reduce_sums, nothing_between
from megarewarm.parallel.collective import collective
from megarewarm.parallel.engine import ParallelModel
from megarewarm.parallel.mesh import Mesh
from megarewarm.training.after_step.abilities import Abilities
from megarewarm.training.after_step.part import Context, Moment
from megarewarm.training.after_step.progress import loss_line
from megarewarm.training.run import Run
from megarewarm.training.start.evaluations import evaluation_steps, evaluations_at

Evaluated = tuple[WindowSet, float, int]
"""A set, its mean loss in nats per token, and the number of tokens."""


class Evaluate:
    """Evaluates every set and every task that is due: all of them or, if the run is interrupted, none."""

    def __init__(self, context: Context) -> None:
        plan = context.run.plan
        self._context = context
        self._steps = set(evaluation_steps(plan.config, plan.origin.step, plan.origin.step + plan.schedule.warmup_steps))
        self._abilities = Abilities(context)
        self._unevaluated = False
        """Whether the evaluation after the newest step is missing."""

    def state(self) -> dict[str, Any]:
        return {"unevaluated": self._unevaluated, **self._abilities.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._unevaluated = state["unevaluated"]
        self._abilities.restore(state)

    def after(self, moment: Moment) -> None:
        run = self._context.run
        # also "late": evaluation.every may have changed since the stop
        is_due = run.step in self._steps or self._abilities.is_due
        if moment.when == "step":
            self._unevaluated = is_due
        if moment.when == "start" and is_due:
            self._evaluate([(0, False)] if run.step in self._steps else [], "at the start")
            run.state.start_losses = dict(run.state.losses)
        elif moment.when != "stop" and self._unevaluated:
            if is_due:
                turns = evaluations_at(run.plan.config, run.step) if run.step in self._steps else []
                self._evaluate(turns, f"step {run.step}")
            self._unevaluated = False
        moment.unevaluated = self._unevaluated

    def _evaluate(self, turns: Sequence[tuple[int, bool]], when: str) -> None:
        context, run = self._context, self._context.run
        began = time.monotonic()
        evaluated: list[list[Evaluated]] = []
        for number, last in turns:
            due = [windows for windows in run.validation if windows.when != "end" or last]
            evaluated.append([(windows, *evaluate_set(run, windows, number, context.between(windows.name))) for windows in due])
        tested = self._abilities.test() if self._abilities.is_due else []
        computed = sum(tokens for turn in evaluated for _, _, tokens in turn) + (run.tasks.tokens if tested else 0)
        context.progress.evaluated(computed, time.monotonic() - began)
        for turn in evaluated:
            for windows, loss, tokens in turn:
                run.state.evaluated({windows.name: loss})
                context.metrics.event(
                    "eval",
                    step=run.step,
                    tokens=run.plan.tokens(run.step),
                    name=windows.name,
                    role=windows.role,
                    loss=loss,
                    over=tokens,
                )
            if turn:
                losses = {windows.name: loss for windows, loss, _ in turn}
                context.voice.tell(loss_line(when, losses, run.state.start_losses, context.voice.width))
        self._abilities.record(tested, when)


@collective
def evaluate_set(run: Run, windows: WindowSet, number: int, between: Between) -> tuple[float, int]:
    """(mean loss in nats per token, tokens) of one validation set in evaluation ``number``. All ranks call it."""
    config = run.plan.config
    micro_batch = config.evaluation.micro_batch or config.training.micro_batch_size
    part = windows.slice(number if windows.when == "always" else 0)
    return evaluate(run.model, part, micro_batch, run.mesh, between)


def evaluate(
    model: ParallelModel, windows: Slice, micro_batch: int, mesh: Mesh, between: Between = nothing_between
) -> tuple[float, int]:
    """Mean loss in nats per token over all windows of a set, and the number of tokens."""
    ranks = mesh.layout.data
    rows = windows.micro_batches(mesh.data_rank, ranks, micro_batch)
    most = max(len(windows.share(rank, ranks)) for rank in range(ranks))
    total, count = all_reduce_sums(model.evaluate(rows, most, micro_batch, between))
    return total / count if count else math.nan, int(count)
