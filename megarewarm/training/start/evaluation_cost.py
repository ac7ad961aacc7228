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
from megarewarm.training.start.evaluations import evaluation_steps, evaluations_at
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
    """``steps``: those that an evaluation follows, ascending; ``tokens``: of each. What is evaluated once the run is trained:
    ``interpolated``: tokens between start and end, ``averaged``: of the average of the last weights. ``share``: of the run's
    compute that all of these take.

    Forward passes are counted: an evaluated token costs one, a trained one three and those that ``training.recompute`` and the
    teacher of ``distill`` add.
    """

    steps: tuple[int, ...]
    tokens: tuple[int, ...]
    interpolated: int
    share: float
    averaged: int = 0

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
        usual = self.tokens[0]
        times = sum(tokens == usual for tokens in self.tokens)
        parts = [f"{times:,} x {tokens_text(usual)} tokens"]
        parts += [f"once {tokens_text(tokens)}" for tokens in self.tokens if tokens != usual]
        if self.interpolated:
            parts.append(f"{tokens_text(self.interpolated)} between start and end")
        if self.averaged:
            parts.append(f"{tokens_text(self.averaged)} of the average")
        share = 100 * self.share
        return f"{' + '.join(parts)}, {share:.0f} % of the compute" if share >= 0.5 else f"{' + '.join(parts)}, below 1 %"


def evaluation_cost(plan: Plan, tokens: Mapping[str, int]) -> EvaluationCost | None:
    """Of the whole run of ``plan``, whose sets have ``tokens`` each; None if nothing is evaluated."""
    config, first, total = plan.config, plan.origin.step, plan.config.total_steps
    always = sum(tokens.get(entry.name, 0) for entry in config.data.validation if entry.when == "always")
    everything = sum(tokens.values())
    steps, each = [], []
    for step in evaluation_steps(config, first, first + plan.schedule.warmup_steps):
        found = sum(
            everything if last else always for _, last in ([(0, False)] if step == first else evaluations_at(config, step))
        )
        if found:
            steps.append(step)
            each.append(found)
    if not steps:
        return None
    interpolated = len(config.interpolate.alphas) * everything if config.interpolate is not None else 0
    averaged = everything if config.checkpoint.average is not None else 0
    evaluated = sum(each) + interpolated + averaged
    passes = PASSES[config.training.recompute] + _taught_passes(plan)
    trained = passes * (total - first) * config.tokens_per_step
    return EvaluationCost(tuple(steps), tuple(each), interpolated, evaluated / (evaluated + trained), averaged)


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
    every = plan.config.evaluation.every
    return [
        f"evaluation takes {100 * cost.share:.0f} % of the compute; a longer evaluation.every (now "
        f"{'null' if every is None else every}) or fewer 'tokens' of the validation sets make it less"
    ]
