"""Follows the metrics files of runs that are under way: each look costs only the bytes written since the last one.

``run.py`` reads a file whole; this keeps what a live view needs, in memory that doesn't grow with the steps. Both go by the
rules of ``lines.py``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections import deque
from pathlib import Path
from typing import Any, BinaryIO

from megarewarm.errors import UserError
from megarewarm.record.events import TrainLine
from megarewarm.record.lines import RESTARTS, TRAIN_START, CountedEvents, Lines, in_bits, mean_losses, number, parse

WINDOW = 1024
"""Train lines that are kept: what medians and rates are taken over."""

_CHUNK = 1 << 22  # bytes in memory at once
_GUARD = 64  # bytes before the offset that must still be what was read


class Follower(CountedEvents):
    """What ``metrics.jsonl`` holds so far; ``poll()`` reads on.

    ``recent`` holds the last train lines, superseded ones left out; ``first_step`` the step before the first one trained;
    ``stop`` the stop event, ``None`` while none is the last word; ``time`` the newest line's time and ``longest_gap`` the
    longest that passed between two lines of the newest process, in seconds; ``damage`` a sentence for the first line that is
    no JSON, ``None`` where there is none.
    """

    keeps = ("alarm", "resume")

    def __init__(self, path: Path | str, window: int = WINDOW) -> None:
        self.path = Path(path)
        self._window = window
        self._clear()

    def _clear(self) -> None:
        super().__init__()
        self.recent: deque[TrainLine] = deque(maxlen=self._window)
        self.first_step: int | None = None
        self.stop: dict[str, Any] | None = None
        self.time = math.nan
        self.damage: str | None = None
        self._offset = 0
        self._guard = b""
        self._inode: int | None = None
        self.lines = Lines(self.path, self._damaged)
        self._origin: int | None = None  # the start event's step counter
        self._session_lines = 0  # train lines since the newest process began
        self.longest_gap = 0.0

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """The alarm events that count."""
        return [event for event in self.events if event["event"] == "alarm"]

    def poll(self) -> bool:
        """Read what is new. Returns whether anything was; a file that doesn't exist yet is nothing.

        A last line without its line break is left for the next time. A file that was replaced, or is shorter than what was
        read of it, is read again. Raises ``UserError`` for a file that can't be read.
        """
        try:
            with open(self.path, "rb") as file:
                return self._read(file)
        except FileNotFoundError:
            changed = self.lines.number > 0
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
        trains = [line.startswith(TRAIN_START) for line in lines]
        later, at = sum(trains), 0
        while at < len(lines):
            end = at
            while end < len(lines) and trains[end]:
                end += 1
            later -= end - at  # train lines of the block after this row: they take its places in the window
            skip_to = min(end - 1, end - self._window + later)
            if skip_to > at + 2:
                self.lines.take(lines[at], self)
                first, last = parse(lines[at]), parse(lines[end - 1])
                # steps that count up by one leave no room for a torn line or a repeated step
                if first and last and number(last.get("step")) - number(first.get("step")) == end - 1 - at:
                    self._session_lines += skip_to - at - 1
                    self.lines.number += skip_to - at - 1
                    self.time = math.nan  # their duration is unknown
                    at = skip_to - 1
                at += 1
            for line in lines[at : end + 1]:
                self.lines.take(line, self)
            at = end + 1

    def _damaged(self, line: int, what: str) -> None:
        self.damage = self.damage or f"line {line} of {self.path.name} is {what}"

    def add(self, event: dict[str, Any]) -> None:
        super().add(event)
        kind = event["event"]
        if kind in ("train", "stop", *RESTARTS):
            self.stop = event if kind == "stop" else None
        if kind == "start" or (kind == "resume" and int(event["step"]) < 0):
            self._origin = step if isinstance(step := event.get("step"), int) and step >= 0 else None
        if kind in RESTARTS:
            self._session_lines, self.longest_gap, self.time = 0, 0.0, math.nan
        time = number(event.get("time"))
        if math.isfinite(time - self.time):
            self.longest_gap = max(self.longest_gap, time - self.time)
        if math.isfinite(time):
            self.time = time

    def add_step(self, step: int, event: dict[str, Any]) -> None:
        if self.first_step is None:
            self.first_step = step - 1
        self._session_lines += 1
        self.recent.append(TrainLine(step, *(number(event.get(name)) for name in _NUMBERS)))  # the order of its fields

    def supersede(self, step: int) -> None:
        super().supersede(step)
        while self.recent and self.recent[-1].step > step:
            self.recent.pop()
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

    def losses(self, role: str, *, bits: bool = False) -> list[tuple[int, float]]:
        """(step, loss) of every evaluation of ``role``, ascending: the mean of its sets where all were evaluated; in bits per
        byte with ``bits``."""
        found = self.evaluations.values()
        return [(step, loss) for step, _, loss in mean_losses(map(in_bits, found) if bits else found, role)]

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
