"""Which of a run's checkpoints stay. A pure function of their steps and losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """``keep_last``: how many of the newest stay. ``for_good``: steps that are never removed; ``keep_every``: so are its
    multiples. ``best_on``: the validation set whose lowest loss stays as well."""

    keep_last: int
    keep_every: int | None = None
    for_good: frozenset[int] = frozenset()
    best_on: str | None = None

    def keeps_for_good(self, step: int) -> bool:
        """Whether the checkpoint of ``step`` stays however many follow."""
        return step in self.for_good or (self.keep_every is not None and step % self.keep_every == 0)

    def staying(self, losses: Mapping[int, float | None]) -> set[int]:
        """The steps that stay. ``losses``: step of each checkpoint -> its loss on ``best_on``, None where not measured there.

        The newest always stays; of equally good ones the oldest is the best.
        """
        newest = sorted(losses)[-max(self.keep_last, 1) :]
        measured = [(loss, step) for step, loss in losses.items() if loss is not None]
        best = [min(measured)[1]] if self.best_on is not None and measured else []
        return {*newest, *best, *(step for step in losses if self.keeps_for_good(step))}
