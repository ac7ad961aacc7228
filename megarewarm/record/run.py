"""Reads a run folder: ``metrics.jsonl``, one JSON object a line, and ``config.yaml``.

The file only grows. A run that went back to a checkpoint tells some steps twice; only the last telling counts.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from megarewarm.errors import UserError
from megarewarm.record.config_yaml import read_settings
from megarewarm.record.experiment import RUN_FORMAT, check_format

UPSTREAM, DOWNSTREAM = "upstream", "downstream"
_RESTARTS = ("resume", "start")
_COLUMNS = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "lr_sum", "annealing_area")
_EVENT_START = b'{"event"'
_TRAIN = (b'{"event":"train"', b'{"event": "train"')
_CHUNK = 1 << 18  # bytes of lines in memory at once
_ROW = 16  # train lines in a row from which on they are taken in together


class NothingYet(UserError):
    """A metrics file that has neither a train nor an eval line: the run has only just started."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One validation set's mean loss in nats per token after ``step`` steps, ``tokens`` tokens into the run."""

    step: int
    tokens: float
    name: str
    role: str
    loss: float


@dataclasses.dataclass(frozen=True)
class Curve:
    """``losses`` in nats per token against ``tokens`` trained in this run, both (points,) float64."""

    tokens: NDArray[np.float64]
    losses: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class RecordedRun:
    """What a run folder tells, superseded lines left out.

    ``train`` holds the train events' columns, (steps,) float64 each, NaN where a line has no such number. ``start`` is
    the first start event, empty where there is none; ``events`` are the other events, in order.
    """

    folder: Path
    config: dict[str, Any]
    start: dict[str, Any]
    train: dict[str, NDArray[np.float64]]
    evaluations: list[Evaluation]
    events: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return str(self.start.get("name") or self.config.get("name") or self.folder.name)

    @property
    def origin(self) -> str | None:
        """The checkpoint that the run started from; ``None`` from scratch."""
        configured = self.config.get("start")
        origin = self.start.get("from") or (configured.get("from") if isinstance(configured, dict) else None)
        return str(origin) if origin else None

    @property
    def first_step(self) -> int:
        """The step before the first training step: 0, or more where the step counter was carried on."""
        steps = self.train["step"]
        if len(steps):
            return int(steps[0]) - 1
        return min((evaluation.step for evaluation in self.evaluations), default=0)

    @property
    def steps(self) -> int:
        """Optimizer steps of this run."""
        return int(self.train["step"][-1]) - self.first_step if len(self.train["step"]) else 0

    @property
    def tokens_before(self) -> float:
        """Value of the token counter at the start of this run: 0, or more where the counter was carried on."""
        for evaluation in self.evaluations:
            if evaluation.step == self.first_step:
                return evaluation.tokens
        steps, tokens = self.train["step"], self.train["tokens"]
        if len(steps) == 0:
            return 0.0
        per_step = (tokens[-1] - tokens[0]) / (steps[-1] - steps[0]) if len(steps) > 1 else tokens[0]
        return max(0.0, float(tokens[0] - per_step))

    @property
    def tokens(self) -> float:
        """Tokens trained in this run."""
        return float(self.train["tokens"][-1]) - self.tokens_before if len(self.train["tokens"]) else 0.0

    @property
    def peak_lr(self) -> float | None:
        """Highest learning rate that was used."""
        rates = self.train["lr"][np.isfinite(self.train["lr"])]
        return float(rates.max()) if len(rates) else None

    def sets(self, role: str) -> list[str]:
        """Names of the validation sets of ``role``, in order of appearance."""
        return list(dict.fromkeys(e.name for e in self.evaluations if e.role == role))

    def curve(self, role: str, name: str | None = None) -> Curve:
        """Loss against tokens: of the set ``name``, or the mean of all sets of ``role`` where all were evaluated."""
        names = [name] if name is not None else self.sets(role)
        by_step: dict[int, dict[str, Evaluation]] = {}
        for evaluation in self.evaluations:
            if evaluation.role == role and evaluation.name in names:
                by_step.setdefault(evaluation.step, {})[evaluation.name] = evaluation
        rows = [list(found.values()) for _, found in sorted(by_step.items()) if len(found) == len(names)]
        tokens = np.array([row[0].tokens for row in rows], dtype=np.float64) - self.tokens_before
        return Curve(tokens, np.array([sum(e.loss for e in row) / len(row) for row in rows], dtype=np.float64))

    def start_loss(self, role: str) -> float | None:
        """Loss of the start checkpoint: the evaluation before the first step. ``None`` where there was none."""
        losses = [e.loss for e in self.evaluations if e.role == role and e.step == self.first_step]
        return sum(losses) / len(losses) if losses and len(losses) == len(self.sets(role)) else None


def read_run(folder: Path | str) -> RecordedRun:
    """The run in ``folder``. Raises UserError where it has no readable metrics."""
    folder = Path(folder)
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder.absolute()}: no metrics.jsonl: give the folder of a run that has trained at least one step")
    record = _CountedLines()
    lines = _Lines(path)
    with open(path, "rb") as file:
        while chunk := file.readlines(_CHUNK):
            _take(chunk, lines, record)
    if not record.steps and not record.evaluations:
        raise NothingYet(f"{path}: no train and no eval line: the run ended before its first step")
    return RecordedRun(
        folder, read_settings(folder), record.start, record.columns(), list(record.evaluations.values()), record.events
    )


def read_runs(folders: Sequence[Path | str]) -> list[RecordedRun]:
    """``read_run`` of each folder, in order. Raises UserError for none, or for one given twice."""
    if not folders:
        raise UserError("no run to report: give at least one run folder")
    seen: set[Path] = set()
    for folder in folders:
        if (resolved := Path(folder).resolve()) in seen:
            raise UserError(f"{folder}: given twice: remove one")
        seen.add(resolved)
    return [read_run(folder) for folder in folders]


class _CountedLines:
    """The lines that count so far, in the order of the file. Train lines are columns of numbers: there may be millions."""

    def __init__(self) -> None:
        self.evaluations: dict[tuple[int, str], Evaluation] = {}
        self.start: dict[str, Any] = {}
        self.events: list[dict[str, Any]] = []
        self._columns = {name: array("d") for name in _COLUMNS}
        self.steps = self._columns["step"]  # ascending
        self._others = [(name, column.append) for name, column in self._columns.items() if name != "step"]

    def add(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "train":
                step = int(event["step"])
                if self.steps and step <= self.steps[-1]:
                    # A step that comes again without a resume event: the run was begun anew at it.
                    self._supersede(step - 1)
                self.steps.append(step)
                for name, append in self._others:
                    value = event.get(name)
                    append(value if type(value) is float else _number(value))
            case "eval":
                evaluation = Evaluation(
                    int(event["step"]),
                    float(event["tokens"]),
                    str(event["name"]),
                    str(event.get("role", "other")),
                    _number(event["loss"]),
                )
                key = (evaluation.step, evaluation.name)
                self.evaluations.pop(key, None)  # so that the new one takes the later place
                self.evaluations[key] = evaluation
            case "start":
                self.start = self.start or event
            case "resume":
                step = int(event["step"])
                self._supersede(step)
                if step < 0:  # begun anew: nothing of before counts, the start event included
                    self.start, self.events = {}, []
                else:
                    self.events.append(event)
            case _:
                self.events.append(event)

    def add_train(self, lines: Sequence[bytes]) -> bool:
        """Take in train lines together, as ``add`` would one by one; False, and nothing is taken, where they need its care."""
        try:
            events = orjson.loads(b"[" + b",".join(lines) + b"]")
            if len(events) != len(lines) or any(event["event"] != "train" for event in events):
                return False
            steps = [event["step"] for event in events]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            return False
        if set(map(type, steps)) != {int} or (self.steps and steps[0] <= self.steps[-1]):
            return False
        if not all(map(int.__lt__, steps, steps[1:])):
            return False
        self.steps.extend(steps)
        for name, column in self._columns.items():
            if name != "step":
                values = [event.get(name) for event in events]
                column.extend(values if set(map(type, values)) <= {float, int} else map(_number, values))
        return True

    def columns(self) -> dict[str, NDArray[np.float64]]:
        """The train lines' numbers by name, (steps,) float64, NaN where a line lacks one."""
        return {name: np.frombuffer(column) if column else np.empty(0) for name, column in self._columns.items()}

    def _supersede(self, step: int) -> None:
        """Forget what was told of the steps after ``step``. That there was a resume is never forgotten."""
        kept = bisect.bisect_right(self.steps, step)
        for column in self._columns.values():
            del column[kept:]
        self.evaluations = {key: line for key, line in self.evaluations.items() if key[0] <= step}
        self.events = [e for e in self.events if e["event"] == "resume" or e.get("step", step) <= step]


def _number(value: Any) -> float:
    """NaN for what is no number: a loss that overflowed may have been written as null."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _take(chunk: list[bytes], lines: _Lines, record: _CountedLines) -> None:
    """Take whole lines into ``record``: long rows of train lines together, which is several times as fast, others singly."""
    at = 0
    while at < len(chunk):
        end = at
        while end < len(chunk) and chunk[end].startswith(_TRAIN):
            end += 1
        if end - at >= _ROW and lines.torn is None and record.add_train(chunk[at:end]):
            lines.number += end - at
            at = end
            continue
        for line in chunk[at : end + 1]:
            event = lines.event(line)
            if event is None:
                continue
            if event["event"] == "start":
                check_format(event.get("format", 1), RUN_FORMAT, lines.path)
            try:
                record.add(event)
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{lines.path}, line {lines.number}: a '{event.get('event')}' line with a missing or wrong {error}"
                ) from None
        at = end + 1


class _Lines:
    """The objects that a metrics file's lines hold, one line after the other.

    A crash may tear the last line that a process wrote: at the end of the file, or in front of the next process's first
    line, with or without a line break between the two.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0
        self.torn: int | None = None  # a line which is in order where nothing follows, or a process that starts

    def event(self, line: bytes) -> dict[str, Any] | None:
        """The next line's object, None for one that has none. Raises UserError for lines that are not JSON."""
        self.number += 1
        event = _parse(line)
        if event is None:
            if not line.strip():
                return None
            self.torn = self.number
            cut = line.rfind(_EVENT_START)
            event = _parse(line[cut:]) if cut > 0 else None
            if event is None:
                return None
        if self.torn is not None:
            if event["event"] not in _RESTARTS:
                raise UserError(f"{self.path}, line {self.torn}: not a JSON object: the file was damaged or edited")
            self.torn = None
        return event


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            event = json.loads(line.decode("utf-8", errors="replace"))  # Python's dialect: NaN and Infinity
        except (ValueError, RecursionError):  # not JSON, or a number of more digits than Python reads
            return None
    return event if isinstance(event, dict) and "event" in event else None
