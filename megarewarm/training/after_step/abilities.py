"""Tests on tasks during the run: their scores, and which items were lost and won since the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megarewarm.data.tasks.encode import spans
from megarewarm.data.tasks.score import TaskScores, as_text, chance, from_text, score, transitions
from megarewarm.parallel.agreement import Between, all_reduce_sums, nothing_between
from megarewarm.parallel.collective import collective
from megarewarm.parallel.engine import ParallelModel
from megarewarm.parallel.mesh import Mesh
from megarewarm.record.events import CHANGES, TaskEvent
from megarewarm.training.after_step.part import Context
from megarewarm.training.start.evaluations import task_steps
from megarewarm.training.start.tasks import RunTasks


class Abilities:
    """What the part ``Evaluate`` does about tasks. The state holds which items were right before the first step."""

    def __init__(self, context: Context) -> None:
        plan = context.run.plan
        self._context = context
        self._steps = set(task_steps(plan.config, plan.origin.step))
        self._before: dict[str, tuple[str, str]] = {}
        """By task: the digest of its items, and which were right."""

    @property
    def is_due(self) -> bool:
        return self._context.run.step in self._steps

    def state(self) -> dict[str, Any]:
        return {"tasks_before": self._before} if self._before else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._before = {name: (digest, right) for name, (digest, right) in state.get("tasks_before", {}).items()}

    @collective
    def test(self) -> list[TaskScores]:
        """The scores of all tasks. All ranks call it."""
        run = self._context.run
        return score_tasks(run.model, run.tasks, run.mesh, self._context.between("tasks"))

    def record(self, tested: Sequence[TaskScores], when: str) -> None:
        """Write and print the scores of all tasks, if they were tested."""
        run, told = self._context.run, []
        for each, scores in zip(run.tasks.tasks, tested, strict=False):
            task = each.task
            if run.step == run.plan.origin.step:
                self._before[task.name] = (task.digest, as_text(scores.right))
            digest, right = self._before.get(task.name, ("", ""))
            changed = transitions(task.items, from_text(right), scores.right) if digest == task.digest else None
            event = TaskEvent(
                step=run.step,
                tokens=run.plan.tokens(run.step),
                name=task.name,
                items=len(task.items),
                digest=task.digest,
                accuracy=scores.accuracy,
                accuracy_bytes=scores.accuracy_bytes,
                chance=chance(task.items),
                bits_per_byte=scores.bits_per_byte,
                right=as_text(scores.right),
                right_bytes=as_text(scores.normalised),
                **({} if changed is None else {name: getattr(changed, name) for name in CHANGES}),
            )
            self._context.metrics.event("task", **event.values())
            line = f"{task.name} {100 * scores.accuracy:.1f} %, {scores.bits_per_byte:.3f} bits/byte"
            if changed is not None and run.step > run.plan.origin.step:
                line += f", lost {round(changed.lost * len(task.items))}, won {round(changed.won * len(task.items))}"
            told.append(line)
        for line in told:
            self._context.voice.tell(f"{when}: {line}")


@collective
def score_tasks(model: ParallelModel, tasks: RunTasks, mesh: Mesh, between: Between = nothing_between) -> list[TaskScores]:
    """The scores of all ``tasks``, whose batches the data-parallel ranks share. All ranks call it, and get the same."""
    ranks = mesh.layout.data
    mine = tasks.batches[mesh.data_rank :: ranks]
    count = sum(len(task.rows) for task in tasks.tasks)
    found = np.zeros((2, count))
    for batch, (likelihoods, greedy) in zip(
        mine, model.score_rows(mine, -(-len(tasks.batches) // ranks), between), strict=True
    ):
        found[0, batch.numbers], found[1, batch.numbers] = likelihoods, greedy
    likelihoods, greedy = np.array(all_reduce_sums(found.ravel().tolist())).reshape(2, count)
    return [
        score(each.task, likelihoods[span], greedy[span] > 0)
        for each, span in zip(tasks.tasks, spans(tasks.tasks), strict=True)
    ]
