"""The cost of a run's evaluations relative to its training, before the first step and for the time left."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from megarewarm.config.schema import RunConfig
from megarewarm.data.mixture.validation import WindowSet
from megarewarm.model.size import PASSES, forward_flops_per_token
from megarewarm.spelling import tokens_text
from megarewarm.training.start.evaluations import evaluation_steps, evaluations_at, task_steps
from megarewarm.training.start.plan import Plan

_NOTEWORTHY = 0.2  # share of a run's compute


def tokens_asked(config: RunConfig) -> dict[str, int]:
    """Tokens of one evaluation of each validation set, as far as the configuration says: its sources may hold fewer."""
    length = config.data.sequence_length
    return {entry.name: entry.tokens // length * length for entry in config.data.validation}


def tokens_held(validation: list[WindowSet]) -> dict[str, int]:
    """Tokens of one evaluation of each set."""
    return {windows.name: windows.num_tokens for windows in validation}


@dataclass(frozen=True)
class EvaluationCost:
    """``steps``: those that an evaluation follows, ascending; ``tokens``: of each, ``tasks`` of them those of evaluation.tasks
    (none where that is empty). What is evaluated once the run is trained: ``interpolated``: tokens between start and end,
    ``averaged``: of the average of the last weights. ``share``: of the run's compute that all of these take; ``task_share``:
    that tasks take.

    Forward passes are counted: an evaluated token costs one, a trained one three and those that ``training.recompute`` and the
    teacher of ``distill`` add.
    """

    steps: tuple[int, ...]
    tokens: tuple[int, ...]
    interpolated: int
    share: float
    averaged: int = 0
    tasks: tuple[int, ...] = ()
    task_share: float = 0.0

    def after(self, step: int) -> int:
        """Tokens that are still to be evaluated when the evaluation after ``step`` is done."""
        return self._until[-1] - self._until[bisect_right(self.steps, step)] + self.interpolated + self.averaged

    @cached_property
    def _until(self) -> list[int]:
        return list(accumulate(self.tokens, initial=0))

    @property
    def is_noteworthy(self) -> bool:
        """Whether a user should know."""
        return self.share > _NOTEWORTHY

    def __str__(self) -> str:
        """That of the validation sets."""
        parts = [tokens for tokens in self._of_sets if tokens]
        usual = parts[0] if parts else 0
        told = [f"{parts.count(usual):,} x {tokens_text(usual)} tokens"]
        told += [f"once {tokens_text(tokens)}" for tokens in parts if tokens != usual]
        if self.interpolated:
            told.append(f"{tokens_text(self.interpolated)} between start and end")
        if self.averaged:
            told.append(f"{tokens_text(self.averaged)} of the average")
        return f"{' + '.join(told)}, {_share_text(self.share - self.task_share)}"

    @property
    def of_tasks(self) -> str:
        """That of tasks, '' without any."""
        times = sum(map(bool, self.tasks))
        return f"{times:,} x {tokens_text(max(self.tasks))} tokens, {_share_text(self.task_share)}" if times else ""

    @property
    def _of_sets(self) -> list[int]:
        return [all_of - tasks for all_of, tasks in zip(self.tokens, self.tasks or (0,) * len(self.tokens), strict=True)]


def _share_text(share: float) -> str:
    return f"{100 * share:.0f} % of the compute" if share >= 0.005 else "below 1 %"


def evaluation_cost(plan: Plan, tokens: Mapping[str, int], task_tokens: int = 0) -> EvaluationCost | None:
    """Of the whole run of ``plan``, whose sets have ``tokens`` each and whose tasks ``task_tokens`` together; None if nothing
    is evaluated."""
    config, first, total = plan.config, plan.origin.step, plan.config.total_steps
    always = sum(tokens.get(entry.name, 0) for entry in config.data.validation if entry.when == "always")
    everything = sum(tokens.values())
    tasks = dict.fromkeys(task_steps(config, first) if task_tokens else (), task_tokens)
    sets: dict[int, int] = {}
    for step in evaluation_steps(config, first, first + plan.schedule.warmup_steps):
        found = sum(
            everything if last else always for _, last in ([(0, False)] if step == first else evaluations_at(config, step))
        )
        if found:
            sets[step] = found
    steps = sorted({*sets, *tasks})
    if not steps:
        return None
    tested = [tasks.get(step, 0) for step in steps]
    each = [sets.get(step, 0) + task for step, task in zip(steps, tested, strict=True)]
    interpolated = len(config.interpolate.alphas) * everything if config.interpolate is not None else 0
    averaged = everything if config.checkpoint.average is not None else 0
    evaluated = sum(each) + interpolated + averaged
    passes = PASSES[config.training.recompute] + _taught_passes(plan)
    trained = passes * (total - first) * config.tokens_per_step
    whole = evaluated + trained
    held = tuple(tested) if tasks else ()
    return EvaluationCost(tuple(steps), tuple(each), interpolated, evaluated / whole, averaged, held, sum(tested) / whole)


def _taught_passes(plan: Plan) -> float:
    """What the teacher's forward pass costs in forward passes of the model."""
    if (teacher := plan.taught_by) is None:
        return 0.0
    length = plan.config.data.sequence_length
    return forward_flops_per_token(teacher, length) / forward_flops_per_token(plan.model, length)


def evaluation_note(plan: Plan, cost: EvaluationCost | None) -> list[str]:
    """The line on evaluations that take much of a run's compute, with what to do about it."""
    if cost is None or not cost.is_noteworthy:
        return []
    settings = plan.config.evaluation
    every = settings.every
    less = f"a longer evaluation.every (now {'null' if every is None else every}) or fewer 'tokens' of the validation sets make"
    if cost.task_share > cost.share / 2:
        every = settings.tasks_every
        less = f"a longer evaluation.tasks_every (now {'null' if every is None else every}) or fewer items in the tasks make"
    return [f"evaluation takes {100 * cost.share:.0f} % of the compute; {less} it less"]
