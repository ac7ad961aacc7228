"""The events ``train`` and ``value`` of metrics.jsonl: what a step writes, and what readers take of it."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class TrainEvent:
    """One optimizer step. Losses are in nats per token, ``data_wait`` in seconds.

    ``lr_sum`` and ``annealing_area`` are S1 and S2 of arXiv 2408.11029 over the run's steps. ``distill_loss`` is ``None``
    without a teacher, ``mfu`` where the device's peak is unknown. ``changed`` is False for a step that was skipped.
    """

    step: int
    tokens: int
    loss: float
    lr: float
    lr_sum: float
    annealing_area: float
    grad_norm: float
    tokens_per_second: float
    data_wait: float
    distill_loss: float | None = None
    mfu: float | None = None
    changed: bool = True

    def values(self) -> dict[str, Any]:
        """The keys of the line: without those that are ``None``, and ``changed`` only where it is False."""
        values = {name: value for name in NUMBERS if (value := getattr(self, name)) is not None}
        return values if self.changed else {**values, "changed": False}


NUMBERS = tuple(field.name for field in dataclasses.fields(TrainEvent) if field.name != "changed")
"""The keys that hold numbers."""

COLUMNS = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "lr_sum", "annealing_area")
"""Those that a report reads of every step."""


@dataclasses.dataclass(frozen=True, slots=True)
class ValueEvent:
    """What a valued step did to validation set ``name``, in nats per token of the set; positive: its loss fell.

    ``sources``: the values of all rows that were valued so far, summed by source; ``rows``: their numbers. Of this step:
    ``samples``, ``momentum`` and ``decay`` are the shares of its whole batch, of Adam's momentum and of the weight decay to
    first order, ``predicted`` is their sum, ``measured`` the fall of the loss on the same rows, ``rest`` their difference.
    """

    step: int
    tokens: int
    name: str
    sources: dict[str, float]
    rows: dict[str, int]
    samples: float
    momentum: float
    decay: float
    rest: float
    predicted: float
    measured: float

    def values(self) -> dict[str, Any]:
        """The keys of the line."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True, slots=True)
class TrainLine:
    """One train line as the live view keeps it; NaN where it lacks a number. ``time`` (seconds) is the line's own."""

    step: int
    tokens: float
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    data_wait: float
    time: float
