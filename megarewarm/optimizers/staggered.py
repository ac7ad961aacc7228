"""Optimizers of one kind whose parameters began at different steps: what was frozen has moments, and a correction of their
bias, as old as its own training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from megarewarm.optimizers.optimizer import Optimizer
from megarewarm.parallel.gradients import Gradients


@dataclass(frozen=True)
class Late:
    """An optimizer that began later, and the parameters of the whole model that it updates, on whichever rank they are."""

    names: frozenset[str]
    optimizer: Optimizer


class Staggered:
    """``first`` and ``late`` as one ``Optimizer``. Its count of steps is that of ``first``; the others have their own."""

    def __init__(self, first: Optimizer, late: Sequence[Late]) -> None:
        self.kind, self.first, self.late = first.kind, first, list(late)
        self.guarded = all(part.guarded for part in self._parts)

    def step(self, lr: float, gradients: Gradients | None = None, scale: float | Tensor = 1.0) -> None:
        each = scale if isinstance(scale, Tensor) else 1.0
        if not isinstance(scale, Tensor) and scale != 1.0:  # once for all of them
            assert gradients is not None
            gradients.scale_(scale)
        for part in self._parts:
            part.step(lr, scale=each)

    def take_back(self) -> None:
        for part in self._parts:
            part.take_back()

    def set_lr(self, lr: float) -> None:
        for part in self._parts:
            part.set_lr(lr)

    @property
    def lrs(self) -> list[float]:
        return [lr for part in self._parts for lr in part.lrs]

    def state(self) -> dict[tuple[str, str], Tensor]:
        return {key: tensor for part in self._parts for key, tensor in part.state().items()}

    @property
    def completed_steps(self) -> int:
        return self.first.completed_steps

    def set_completed_steps(self, steps: int) -> None:
        self.first.set_completed_steps(steps)

    def influence(self, name: str, gradient: Tensor, scale: float, clip: float, direction: Tensor) -> Tensor:
        return self._of(name).influence(name, gradient, scale, clip, direction)

    def sums(self, name: str, weights: Tensor, state: Mapping[str, Tensor], start: Tensor | None) -> Tensor:
        return self._of(name).sums(name, weights, state, start)

    @property
    def _parts(self) -> list[Optimizer]:
        return [self.first, *(late.optimizer for late in self.late)]

    def _of(self, name: str) -> Optimizer:
        return next((late.optimizer for late in self.late if name in late.names), self.first)


def parts_of(optimizer: Optimizer) -> tuple[Optimizer, list[Late]]:
    """The optimizer that began with the run, and those that began later."""
    return (optimizer.first, optimizer.late) if isinstance(optimizer, Staggered) else (optimizer, [])
