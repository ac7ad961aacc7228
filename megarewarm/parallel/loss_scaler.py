"""Dynamic loss scaling for fp16 (arXiv 1710.03740, section 3.2): gradients are computed of the loss times a power of two."""

from __future__ import annotations

from dataclasses import dataclass

from megarewarm.errors import UserError

_LARGEST, _SMALLEST = 2.0**24, 2.0**-6


@dataclass
class LossScaler:
    """``scale`` doubles after ``window`` finite steps in a row and is halved, the step left out, after a non-finite one.

    The norm it is told of is the same on all ranks, so all of them keep the same scale without a word.
    """

    scale: float = 2.0**16
    finite_steps: int = 0
    window: int = 1000

    def update(self, finite: bool) -> None:
        """Count a step. Raises ``UserError`` when no scale helps: the run has diverged or fp16 can't hold it."""
        if finite:
            self.finite_steps += 1
            if self.finite_steps >= self.window:
                self.scale, self.finite_steps = min(_LARGEST, 2 * self.scale), 0
            return
        self.scale, self.finite_steps = self.scale / 2, 0
        if self.scale < _SMALLEST:
            raise UserError(
                f"training.precision: the gradients are not finite in fp16 even at a loss scale of {self.scale:g}; use bf16 or "
                f"fp32, or a lower schedule.max_lr"
            )

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"scale": self.scale, "finite_steps": self.finite_steps}

    def restore(self, state: dict[str, float]) -> None:
        """Take up the ``state`` of a checkpoint."""
        self.scale, self.finite_steps = float(state["scale"]), int(state["finite_steps"])
