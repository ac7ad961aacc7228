"""Dynamic loss scaling for fp16 (arXiv 1710.03740, section 3.2): gradients are computed of the loss times a power of two."""

from __future__ import annotations

from dataclasses import dataclass

from megarewarm.config.execution import LossScaleConfig
from megarewarm.errors import UserError

_LARGEST = 2.0**24


@dataclass
class LossScaler:
    """``scale`` doubles after ``window`` finite steps in a row. A step that is not finite is skipped; ``hysteresis`` such steps
    halve the scale.

    Its input, the norm, is the same on all ranks, so all of them keep the same scale without communication.
    """

    settings: LossScaleConfig

    def __post_init__(self) -> None:
        self.scale = self.settings.fixed or self.settings.initial
        self.finite_steps = 0
        self.left = self.settings.hysteresis

    @property
    def adapts(self) -> bool:
        """Whether an overflow changes the scale; under a fixed one it is a bad step like any other."""
        return self.settings.fixed is None

    def update(self, finite: bool) -> None:
        """Count a step. Raises ``UserError`` when no scale helps: the run has diverged or fp16 can't hold it."""
        settings = self.settings
        if not self.adapts:
            return
        if finite:
            self.finite_steps += 1
            if settings.refill:
                self.left = settings.hysteresis
            if self.finite_steps >= settings.window:
                self.scale, self.finite_steps = max(self.scale, min(_LARGEST, 2 * self.scale)), 0
                self.left = settings.hysteresis
            return
        self.finite_steps = 0
        if self.left > 1:
            self.left -= 1
            return
        if self.scale / 2 < settings.smallest:
            raise UserError(
                f"training.precision: the gradients are not finite in fp16 even at a loss scale of {self.scale:g}; use bf16 or "
                f"fp32, or a lower schedule.max_lr"
            )
        self.scale /= 2

    def state(self) -> dict[str, float]:
        """The state for a checkpoint."""
        return {"scale": self.scale, "finite_steps": self.finite_steps, "left": self.left}

    def restore(self, state: dict[str, float]) -> None:
        """Restore the ``state`` of a checkpoint."""
        if self.adapts:
            self.scale, self.finite_steps = float(state["scale"]), int(state["finite_steps"])
            self.left = min(int(state.get("left", self.settings.hysteresis)), self.settings.hysteresis)
