"""Which lines of metrics.jsonl count: the one set of rules, for a file that is read whole and for one that is followed. The
file only grows. A run that went back to a checkpoint writes some steps twice; only the last line of a step counts."""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import orjson

from megarewarm.record.events import TaskEvent, checked_value
from megarewarm.record.layout import RUN_FORMAT, check_format

RESTARTS = ("resume", "start")  # the first events of a process
_EVENT_START = b'{"event"'
TRAIN_START = (b'{"event":"train"', b'{"event": "train"')


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One validation set's mean loss in nats per token after ``step`` steps, ``tokens`` tokens into the run; ``bits_per_byte``:
    the same loss per byte of text, None where the bytes are not known; ``by_position``: (first position, mean loss in nats per
    token) of each distance, where the run measured it."""

    step: int
    tokens: float
    name: str
    role: str
    loss: float
    bits_per_byte: float | None = None
    by_position: tuple[tuple[int, float], ...] = ()


class Lines:
    """The events that the lines of the metrics file at ``path`` hold, one line after the other; ``number`` counts the lines.

    A crash may tear the last line that a process wrote: at the end of the file, or in front of the next process's first
    line, with or without a line break between the two. Any other line that is not JSON is damage: ``damaged`` is called with
    its number and what is wrong with it.
    """

    def __init__(self, path: Path, damaged: Callable[[int, str], None]) -> None:
        self.path = path
        self.number = 0
        self.torn: int | None = None  # a line that is in order if nothing follows, or a process that starts
        self._damaged = damaged

    def event(self, line: bytes) -> dict[str, Any] | None:
        """The next line's event, None for a line without one. Raises ``UserError`` for a start of a newer format."""
        self.number += 1
        event = parse(line)
        if event is None:
            if not line.strip():
                return None
            self.torn = self.number
            cut = line.rfind(_EVENT_START)
            event = parse(line[cut:]) if cut > 0 else None
            if event is None:
                return None
        if self.torn is not None and event["event"] not in RESTARTS:
            self._damaged(self.torn, "not a JSON object: the file was damaged or edited")
        self.torn = None
        if event["event"] == "start":
            check_format(event.get("format", 1), RUN_FORMAT, self.path)
        return event

    def take(self, line: bytes, into: CountedEvents) -> None:
        """Add the next line's event. Raises as ``event``."""
        event = self.event(line)
        if event is None:
            return
        try:
            into.add(event)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            self._damaged(self.number, f"a '{event['event']}' line with a missing or wrong {error}")


class CountedEvents(ABC):
    """The events of a run that count so far. Subclasses keep the train lines, each as it needs them.

    ``step``: the newest step, None before the first. ``start``: the start event, empty before it. ``evaluations`` and
    ``tests`` (on tasks): by (step, name), in the order of the file. ``events``: the other events, of them only the kinds in
    ``keeps`` where that is not None.
    """

    keeps: tuple[str, ...] | None = None

    def __init__(self) -> None:
        self.step: int | None = None
        self.start: dict[str, Any] = {}
        self.evaluations: dict[tuple[int, str], Evaluation] = {}
        self.tests: dict[tuple[int, str], TaskEvent] = {}
        self.events: list[dict[str, Any]] = []

    def add(self, event: dict[str, Any]) -> None:
        """Add the next event. Raises KeyError, TypeError, ValueError or OverflowError for a missing or wrong value."""
        kind = event["event"]
        if kind == "train":
            step = int(event["step"])
            if self.step is not None and step <= self.step:
                self.supersede(step - 1)  # the run was restarted at this step, without a resume event
            self.add_step(step, event)
            self.step = step
        elif kind == "eval":
            step, tokens, name = int(event["step"]), float(event["tokens"]), str(event["name"])
            loss = number(event["loss"])
            bits = number(event.get("bits_per_byte")) if "bytes" in event else None
            places = tuple((int(first), number(each)) for first, each in (event.get("by_position") or {}).items())
            evaluation = Evaluation(step, tokens, name, str(event.get("role", "other")), loss, bits, places)
            self.evaluations.pop((step, name), None)  # so that the new one takes the later place
            self.evaluations[step, name] = evaluation
        elif kind == "task":
            test = TaskEvent.of(event)
            self.tests.pop((test.step, test.name), None)
            self.tests[test.step, test.name] = test
        elif kind == "start":
            self.start = self.start or event
        else:
            if kind == "resume":
                self.supersede(step := int(event["step"]))
                if step < 0:  # restarted: nothing before counts, the start event included
                    self.start, self.events = {}, []
                    return
            if self.keeps is None or kind in self.keeps:
                self.events.append(checked_value(event) if kind == "value" else event)

    @abstractmethod
    def add_step(self, step: int, event: dict[str, Any]) -> None:
        """Keep the train event of ``step``, which is later than the newest."""

    def supersede(self, step: int) -> None:
        """Drop the records of the steps after ``step``, except that there was a resume."""
        self.evaluations = {key: line for key, line in self.evaluations.items() if key[0] <= step}
        self.tests = {key: test for key, test in self.tests.items() if key[0] <= step}
        self.events = [e for e in self.events if e["event"] == "resume" or e.get("step", step) <= step]


def in_bits(evaluation: Evaluation) -> Evaluation:
    """The same with its loss in bits per byte."""
    return dataclasses.replace(evaluation, loss=number(evaluation.bits_per_byte))


def mean_losses(evaluations: Iterable[Evaluation], role: str, name: str | None = None) -> list[tuple[int, float, float]]:
    """(step, tokens, loss), by step: of the set ``name``, or the mean of all sets of ``role`` where all were evaluated."""
    by_step: dict[int, dict[str, Evaluation]] = {}
    for found in evaluations:
        if found.role == role and name in (None, found.name):
            by_step.setdefault(found.step, {})[found.name] = found
    count = len({name for sets in by_step.values() for name in sets})
    whole = [(step, list(sets.values())) for step, sets in sorted(by_step.items()) if len(sets) == count]
    return [(step, sets[0].tokens, sum(found.loss for found in sets) / count) for step, sets in whole]


def number(value: Any) -> float:
    """NaN for null, which stands for a loss that overflowed."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def parse(line: bytes) -> dict[str, Any] | None:
    """The event that is all of ``line``; None if it is no event."""
    try:
        event = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            event = json.loads(line.decode("utf-8", errors="replace"))  # Python's dialect: NaN and Infinity
        except (ValueError, RecursionError):  # not JSON, or a number of more digits than Python reads
            return None
    return event if isinstance(event, dict) and "event" in event else None
