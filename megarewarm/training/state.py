"""The state that changes during a run: its step, learning rates, losses, and the steps that are not in its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megarewarm.checkpoint.own.state import TrainingState


@dataclass
class RunState:
    """The counters of a run that its steps and evaluations change; everything else of a run stays as it was built.

    ``step``: completed steps. ``last_lr``, ``max_lr``: of the run's own steps. ``losses``: the newest validation losses in nats
    per token, by set; ``measured``: those after this very step; ``start_losses``: those before the first step. ``left_out``:
    ranges of steps (first, last) that are not in the weights, disjoint and ascending.
    """

    step: int
    last_lr: float = 0.0
    max_lr: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    start_losses: dict[str, float] = field(default_factory=dict)
    left_out: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def of_checkpoint(cls, saved: TrainingState) -> RunState:
        """The state of a run that resumes from its own checkpoint."""
        stage = saved.lineage.stages[-1]
        return cls(
            saved.step,
            stage.last_lr or 0.0,
            stage.max_lr or 0.0,
            losses=dict(stage.losses),
            start_losses=dict(saved.start_losses),
            left_out=list(stage.left_out),
        )

    def complete_step(self, lr: float) -> None:
        """Count a completed step at learning rate ``lr``."""
        self.step += 1
        self.last_lr, self.max_lr, self.measured = lr, max(self.max_lr, lr), {}

    def evaluated(self, losses: Mapping[str, float]) -> None:
        """Record the losses after the newest step."""
        self.losses |= losses
        self.measured |= losses

    def leave_out(self, first: int, last: int) -> None:
        """Record that the steps from ``first`` to ``last``, the newest, are not in the weights."""
        kept = [(a, b) for a, b in self.left_out if b < first - 1]
        begin = min([first, *(a for a, b in self.left_out if b >= first - 1)])
        self.left_out = [*kept, (begin, last)]
