"""Follows the metrics files of runs that are under way: each look costs only the bytes written since the last one.

``read.py`` reads a finished file whole; this keeps what a live view needs, in memory that doesn't grow with the steps. Both
agree on what counts: the tests compare them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections import deque
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from megarewarm.errors import UserError
from megarewarm.record.experiment import RUN_FORMAT, check_format
from megarewarm.record.run import Evaluation

WINDOW = 1024
"""Train lines that are kept: what medians and rates are taken over."""

_RESTARTS = ("resume", "start")
_TRAIN = (b'{"event":"train"', b'{"event": "train"')
_CHUNK = 1 << 22  # bytes in memory at once
_GUARD = 64  # bytes before the offset that must still be what was read


@dataclasses.dataclass(frozen=True, slots=True)
class TrainLine:
    """One train line; NaN where it lacks a number. ``time`` and ``data_wait`` are in seconds, ``loss`` in nats per token."""

    step: int
    tokens: float
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    data_wait: float
    time: float


class Follower:
    """What ``metrics.jsonl`` tells so far; ``poll()`` reads on.

    ``start`` is the start event, empty before it. ``recent`` holds the last train lines, superseded ones left out;
    ``evaluations`` all evaluations by (step, name); ``step`` is the newest completed step, ``None`` before the first;
    ``first_step`` the step before the first one trained; ``stop`` the stop event, ``None`` while none is the last word;
    ``alarms`` the alarm events that count; ``resumes`` how often it was taken up again; ``time`` the newest line's time
    and ``longest_gap`` the longest that passed between two lines of the newest process, in seconds; ``damage`` a sentence
    for the first line that is no JSON, ``None`` where there is none.
    """

    def __init__(self, path: Path | str, window: int = WINDOW) -> None:
        self.path = Path(path)
        self._window = window
        self._clear()

    def _clear(self) -> None:
        self.start: dict[str, Any] = {}
        self.recent: deque[TrainLine] = deque(maxlen=self._window)
        self.evaluations: dict[tuple[int, str], Evaluation] = {}
        self.step: int | None = None
        self.first_step: int | None = None
        self.stop: dict[str, Any] | None = None
        self.alarms: list[dict[str, Any]] = []
        self.resumes = 0
        self.time = math.nan
        self.damage: str | None = None
        self.lines = 0
        self._offset = 0
        self._guard = b""
        self._inode: int | None = None
        self._torn: int | None = None
        self._origin: int | None = None  # the start event's step counter
        self._session_lines = 0  # train lines since the newest process began
        self.longest_gap = 0.0

    def poll(self) -> bool:
        """Read what is new. Returns whether anything was; a file that doesn't exist yet is nothing.

        A last line without its line break is left for the next time. A file that was replaced, or is shorter than what was
        read of it, is read anew. Raises ``UserError`` for a file that can't be read.
        """
        try:
            with open(self.path, "rb") as file:
                return self._read(file)
        except FileNotFoundError:
            changed = self.lines > 0
            self._clear()
            return changed
        except OSError as error:
            raise UserError(f"{self.path}: can't be read ({error.strerror or error}): check its permissions") from None

    def _read(self, file: BinaryIO) -> bool:
        status = os.fstat(file.fileno())
        changed = False
        if self._offset and not self._is_same(file, status):
            self._clear()
            changed = True
        self._inode = status.st_ino
        file.seek(self._offset)
        rest = b""
        while chunk := file.read(_CHUNK):
            whole, end, rest = (rest + chunk).rpartition(b"\n")
            if not end:
                continue
            self._block(whole.split(b"\n"))
            self._offset += len(whole) + 1
            self._guard = (whole + end)[-_GUARD:]
            changed = True
        return changed

    def _is_same(self, file: BinaryIO, status: os.stat_result) -> bool:
        """Whether the file is still the one that was read up to the offset."""
        if status.st_ino != self._inode or status.st_size < self._offset:
            return False
        file.seek(self._offset - len(self._guard))
        return file.read(len(self._guard)) == self._guard

    def _block(self, lines: list[bytes]) -> None:
        """Take in whole lines. Of a row of train lines only its ends and those that stay in the window are parsed."""
        is_train = [line.startswith(_TRAIN) for line in lines]
        later, at = sum(is_train), 0
        while at < len(lines):
            end = at
            while end < len(lines) and is_train[end]:
                end += 1
            later -= end - at  # train lines of the block after this row: they take its places in the window
            skip_to = min(end - 1, end - self._window + later)
            if skip_to > at + 2:
                self._next(lines[at])
                first, last = _parse(lines[at]), _parse(lines[end - 1])
                # steps that count up by one leave no room for a torn line or a step told twice
                if first and last and _number(last.get("step")) - _number(first.get("step")) == end - 1 - at:
                    self._session_lines += skip_to - at - 1
                    self.lines += skip_to - at - 1
                    self.time = math.nan  # how long they took is not known
                    at = skip_to - 1
                at += 1
            for line in lines[at : end + 1]:
                self._next(line)
            at = end + 1

    def _next(self, line: bytes) -> None:
        self.lines += 1
        self._line(line)

    def _line(self, line: bytes) -> None:
        """Take in one line, by the rules for torn lines that ``read.py`` has; other damage is noted and passed over."""
        if not line.strip():
            return
        event = _parse(line)
        if event is None and (cut := line.rfind(b'{"event"')) > 0:
            event = _parse(line[cut:])
            self._torn = self.lines
        elif event is None:
            self._torn = self.lines
        if event is None:
            return
        if self._torn is not None and event["event"] not in _RESTARTS:
            self._note(self._torn, "is not a JSON object: the file was damaged or edited")
        self._torn = None
        try:
            self._add(event)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            self._note(self.lines, f"is a '{event['event']}' line with a missing or wrong {error}")

    def _note(self, number: int, what: str) -> None:
        self.damage = self.damage or f"line {number} of {self.path.name} {what}"

    def _add(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "train":
            step = int(event["step"])
            if self.step is not None and step <= self.step and self.first_step is not None:
                self._supersede(step - 1)  # the run was begun anew at this step, with no resume event
            if self.first_step is None:
                self.first_step = step - 1
            self.step, self.stop = step, None
            self._session_lines += 1
            self.recent.append(
                TrainLine(step, *(_number(event.get(name)) for name in _NUMBERS))  # the order of TrainLine's fields
            )
        elif kind == "eval":
            role = str(event.get("role", "other"))
            evaluation = Evaluation(
                int(event["step"]), float(event["tokens"]), str(event["name"]), role, _number(event["loss"])
            )
            key = (evaluation.step, evaluation.name)
            self.evaluations.pop(key, None)  # so that the new one takes the later place
            self.evaluations[key] = evaluation
        elif kind == "resume":
            step = int(event["step"])
            self._supersede(step)
            self.resumes, self.stop = self.resumes + 1, None
            if step < 0:  # begun anew: nothing of before counts
                self.start, self.resumes, self.alarms, self._origin = {}, 0, [], None
        elif kind == "start":
            check_format(event.get("format", 1), RUN_FORMAT, self.path)
            self.start = self.start or event
            self.stop = None
            self._origin = int(event["step"]) if isinstance(event.get("step"), int) else None
        elif kind == "stop":
            self.stop = event
        elif kind == "alarm":
            self.alarms.append(event)
        if kind in _RESTARTS:
            self._session_lines, self.longest_gap, self.time = 0, 0.0, math.nan
        time = _number(event.get("time"))
        if math.isfinite(time - self.time):
            self.longest_gap = max(self.longest_gap, time - self.time)
        if math.isfinite(time):
            self.time = time

    def _supersede(self, step: int) -> None:
        """Forget what was told of the steps after ``step``."""
        while self.recent and self.recent[-1].step > step:
            self.recent.pop()
        self.evaluations = {key: found for key, found in self.evaluations.items() if key[0] <= step}
        self.alarms = [alarm for alarm in self.alarms if alarm.get("step", step) <= step]
        if self.first_step is not None and step <= self.first_step:
            self.first_step = self.step = None
        elif self.step is not None:
            # where the window doesn't reach back that far, every step up to the checkpoint was trained all the same
            self.step = self.recent[-1].step if self.recent else min(self.step, step)

    @property
    def origin_step(self) -> int:
        """The step counter before this run's first step: 0, or more where it was carried on."""
        if self.first_step is not None:
            return self.first_step
        if self._origin is not None:
            return self._origin
        return min((step for step, _ in self.evaluations), default=0)

    @property
    def total_steps(self) -> int | None:
        """The step at which the run ends, as its start event says."""
        total = self.start.get("total_steps")
        return total if isinstance(total, int) and total > 0 else None

    @property
    def is_continued(self) -> bool:
        """Whether it started from a checkpoint, so that its first evaluation is the start checkpoint's."""
        return bool(self.start.get("from"))

    def losses(self, role: str) -> list[tuple[int, float]]:
        """(step, loss) of every evaluation of ``role``, ascending: the mean of its sets where all were evaluated."""
        names = {found.name for found in self.evaluations.values() if found.role == role}
        by_step: dict[int, list[float]] = {}
        for found in self.evaluations.values():
            if found.role == role:
                by_step.setdefault(found.step, []).append(found.loss)
        return [(step, sum(found) / len(found)) for step, found in sorted(by_step.items()) if len(found) == len(names)]

    def seconds_per_step(self) -> float | None:
        """Wall-clock seconds of a step lately, evaluations and saves included; ``None`` where two lines don't tell it."""
        times = [(line.step, line.time) for line in self._session() if math.isfinite(line.time)]
        if len(times) >= 2 and times[-1][0] > times[0][0] and times[-1][1] > times[0][1]:
            return (times[-1][1] - times[0][1]) / (times[-1][0] - times[0][0])
        line = self.recent[-1] if self.recent else None
        per_step = self.tokens_per_step()
        if line is None or per_step is None or not line.tokens_per_second > 0:
            return None
        return per_step / line.tokens_per_second

    def tokens_per_step(self) -> float | None:
        """Tokens of one optimizer step."""
        told = self.start.get("tokens_per_step")
        if isinstance(told, int | float) and told > 0:
            return float(told)
        if self.recent and self.recent[-1].step > 0 and self.recent[-1].tokens > 0:
            return self.recent[-1].tokens / self.recent[-1].step
        return None

    def _session(self) -> list[TrainLine]:
        """The recent lines that the newest process wrote: between two processes any time may have passed."""
        return list(itertools.islice(self.recent, max(0, len(self.recent) - self._session_lines), None))


_NUMBERS = tuple(field.name for field in dataclasses.fields(TrainLine))[1:]


def _number(value: Any) -> float:
    """NaN for what is no number: a loss that overflowed is written as null."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return event if isinstance(event, dict) and "event" in event else None
