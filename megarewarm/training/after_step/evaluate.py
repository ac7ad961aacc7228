"""Validation losses: every named set on the same tokens each time, weighted by tokens, equal for any number of ranks; and tests
on tasks where these are due."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

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
from megarewarm.training.start.text_bytes import bits_per_byte

_FIRST = 64  # positions of the first distance; each further one ends at twice the position


@dataclass(frozen=True)
class Evaluated:
    """``loss``: the mean in nats per token over ``tokens``; ``by_position``: of the positions from each key on to the next, if
    it was asked for."""

    loss: float
    tokens: int
    by_position: dict[str, float] | None = None


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
        evaluated: list[list[tuple[WindowSet, Evaluated]]] = []
        for number, last in turns:
            due = [windows for windows in run.validation if windows.when != "end" or last]
            evaluated.append([(windows, evaluate_set(run, windows, number, context.between(windows.name))) for windows in due])
        tested = self._abilities.test() if self._abilities.is_due else []
        is_main = run.ranks.is_main
        computed = sum(found.tokens for turn in evaluated for _, found in turn) + (run.tasks.tokens if tested else 0)
        context.progress.evaluated(computed, time.monotonic() - began)
        for (number, _), turn in zip(turns, evaluated, strict=True):
            for windows, found in turn:
                loss, tokens = found.loss, found.tokens
                run.state.evaluated({windows.name: loss})
                context.metrics.event(
                    "eval",
                    step=run.step,
                    tokens=run.plan.tokens(run.step),
                    name=windows.name,
                    role=windows.role,
                    loss=loss,
                    over=tokens,
                    **(_per_byte(run, windows, number, loss, tokens) if is_main else {}),
                    **({} if found.by_position is None else {"by_position": found.by_position}),
                )
            if turn:
                losses = {windows.name: found.loss for windows, found in turn}
                context.voice.tell(loss_line(when, losses, run.state.start_losses, context.voice.width))
        self._abilities.record(tested, when)


def _per_byte(run: Run, windows: WindowSet, number: int, loss: float, tokens: int) -> dict[str, float]:
    """The loss in bits per byte and the bytes, where the text of the set is known."""
    count = run.inputs.text_bytes.measured(windows, slice_number(windows, number), tokens)
    bits = bits_per_byte(loss, tokens, count)
    return {} if bits is None or count is None else {"bits_per_byte": bits, "bytes": count}


def slice_number(windows: WindowSet, number: int) -> int:
    """The slice of a set that evaluation ``number`` reads."""
    return number if windows.when == "always" else 0


@collective
def evaluate_set(run: Run, windows: WindowSet, number: int, between: Between) -> Evaluated:
    """One validation set in evaluation ``number``. All ranks call it."""
    config = run.plan.config
    micro_batch = config.evaluation.micro_batch or config.training.micro_batch_size
    part = windows.slice(slice_number(windows, number))
    if not config.evaluation.by_position:
        return Evaluated(*evaluate(run.model, part, micro_batch, run.mesh, between))
    edges = position_edges(config.data.sequence_length)
    rows, most = _share(part, run.mesh, micro_batch)
    sums = run.model.evaluate_by_position(rows, most, micro_batch, edges, between)
    total = np.reshape(all_reduce_sums(sums.flatten().tolist()), sums.shape)
    losses = {
        str(first): float(loss / count) if count else math.nan for first, (loss, count) in zip(edges, total, strict=False)
    }
    loss, count = total.sum(0)
    return Evaluated(float(loss / count) if count else math.nan, int(count), losses)


def position_edges(length: int) -> list[int]:
    """0, 64, 128, 256 and so on up to ``length``: where the distances begin, and the end."""
    edges, edge = [0], _FIRST
    while edge < length:
        edges.append(edge)
        edge *= 2
    return [*edges, length]


def _share(windows: Slice, mesh: Mesh, micro_batch: int) -> tuple[Iterator[npt.NDArray[np.int64]], int]:
    """(this rank's rows, the most windows that a rank has)."""
    ranks = mesh.layout.data
    rows = windows.micro_batches(mesh.data_rank, ranks, micro_batch)
    return rows, max(len(windows.share(rank, ranks)) for rank in range(ranks))


def evaluate(
    model: ParallelModel, windows: Slice, micro_batch: int, mesh: Mesh, between: Between = nothing_between
) -> tuple[float, int]:
    """Mean loss in nats per token over all windows of a set, and the number of tokens."""
    rows, most = _share(windows, mesh, micro_batch)
    total, count = all_reduce_sums(model.evaluate(rows, most, micro_batch, between))
    return total / count if count else math.nan, int(count)
