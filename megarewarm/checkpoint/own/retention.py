"""Which of a run's checkpoints stay. A pure function of their steps and losses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megarewarm.config.grid import Grid


@dataclass(frozen=True)
class Retention:
    """``keep_last``: how many of the newest stay. ``for_good``: steps that are never removed; ``keep_every``: nor are its
    multiples. ``best_on``: the validation set whose best checkpoint stays as well.

    A checkpoint that was written because the run was stopped counts for none of these: it stays while it is the newest, so
    that a stopped run keeps the same checkpoints as an uninterrupted one.
    """

    keep_last: int
    keep_every: Grid | None = None
    for_good: frozenset[int] = frozenset()
    best_on: str | None = None

    def keeps_for_good(self, step: int) -> bool:
        """Whether the checkpoint of ``step`` is kept permanently."""
        return step in self.for_good or (
            self.keep_every is not None and (step == 0 or self.keep_every.number(step) is not None)
        )

    def staying(self, losses: Mapping[int, float | None], interim: frozenset[int] = frozenset()) -> set[int]:
        """The steps that stay. ``losses``: step of each checkpoint -> its loss on ``best_on``, None if not measured there;
        ``interim``: those that were written because the run was stopped.

        The newest always stays; of equally good ones the oldest is the best. A loss that is not finite is none.
        """
        planned = sorted(losses.keys() - interim)
        newest = [*planned[-max(self.keep_last, 1) :], *sorted(losses)[-1:]]
        measured = [(loss, step) for step in planned if (loss := losses[step]) is not None and math.isfinite(loss)]
        best = [min(measured)[1]] if self.best_on is not None and measured else []
        return {*newest, *best, *(step for step in planned if self.keeps_for_good(step))}
