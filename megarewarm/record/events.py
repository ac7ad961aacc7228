"""The events ``train``, ``value`` and ``task`` of metrics.jsonl: what a step writes, and what readers take of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
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


def checked_value(line: dict[str, Any]) -> dict[str, Any]:
    """A line of the event with numbers where a reader takes them to be. Raises KeyError, TypeError or ValueError."""
    numbers = [line["tokens"], *line["sources"].values(), *(line.get(name, 0.0) for name in ("predicted", "measured"))]
    for value in numbers:
        float(0.0 if value is None else value)
    return {**line, "name": str(line["name"]), "sources": {k: math.nan if v is None else v for k, v in line["sources"].items()}}


@dataclasses.dataclass(frozen=True, slots=True)
class TaskEvent:
    """A test of the model on the ``items`` items of task ``name`` after ``step`` steps.

    ``digest``: of the items. ``accuracy``, and ``accuracy_bytes`` by log-likelihood per byte; ``chance`` is what guessing would
    reach; ``bits_per_byte`` of the right answers. ``right``, ``right_bytes``: a 1 for each item that is right by either, 0 for
    the others, in the order of the file. ``lost``, ``won``: the shares of items that were right before the run's first step
    and are wrong now, and the other way round, by ``accuracy``; ``lost_beyond``, ``won_beyond``: as far as guessing does not
    explain them; all four None without such a test before.
    """

    step: int
    tokens: int
    name: str
    items: int
    digest: str
    accuracy: float
    accuracy_bytes: float
    chance: float
    bits_per_byte: float
    right: str
    right_bytes: str
    lost: float | None = None
    won: float | None = None
    lost_beyond: float | None = None
    won_beyond: float | None = None

    def values(self) -> dict[str, Any]:
        """The keys of the line."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def of(cls, line: dict[str, Any]) -> TaskEvent:
        """That of a line. Raises KeyError, TypeError or ValueError for a missing or wrong value."""
        kinds: dict[str, Callable[[Any], Any]] = {"int": int, "str": str, "float": float}
        told: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            value = line.get(field.name) if field.name in CHANGES else line[field.name]
            told[field.name] = value if value is None else kinds[str(field.type).removesuffix(" | None")](value)
        return cls(**{**told, "bits_per_byte": math.nan if told["bits_per_byte"] is None else told["bits_per_byte"]})


CHANGES = ("lost", "won", "lost_beyond", "won_beyond")
"""The keys of a task line that compare it with the one before the first step."""


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
