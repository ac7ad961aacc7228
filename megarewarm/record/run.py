"""Reads a run folder: ``metrics.jsonl``, one JSON object a line, and ``config.yaml``."""

from __future__ import annotations

import bisect
import dataclasses
from array import array
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from megarewarm.errors import UserError
from megarewarm.record.config_yaml import read_settings
from megarewarm.record.events import COLUMNS, TaskEvent
from megarewarm.record.layout import METRICS_FILE
from megarewarm.record.lines import TRAIN_START, CountedEvents, Evaluation, Lines, in_bits, mean_losses, number

UPSTREAM, DOWNSTREAM = "upstream", "downstream"
NATS, BITS = "nats per token", "bits per byte"
APART = "nats per token, of different tokenizers, which don't compare"
"""The units of validation losses: ``RecordedRun.unit``."""

_CHUNK = 1 << 18  # bytes of lines in memory at once
_ROW = 16  # train lines in a row from which on they are parsed together


class NothingYet(UserError):
    """A metrics file with neither a train nor an eval line: the run has just started."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """``losses`` in the run's unit against ``tokens`` trained in this run, both (points,) float64."""

    tokens: NDArray[np.float64]
    losses: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class RecordedRun:
    """The contents of a run folder, without superseded lines.

    ``train`` holds the train events' columns, (steps,) float64 each, NaN if a line lacks the number. ``start`` is the first
    start event, empty without one; ``tests`` are those on tasks, ``events`` the other events, in order. ``unit``: of the losses
    of ``evaluations``; see ``in_one_unit``.
    """

    folder: Path
    config: dict[str, Any]
    start: dict[str, Any]
    train: dict[str, NDArray[np.float64]]
    evaluations: list[Evaluation]
    events: list[dict[str, Any]]
    unit: str = NATS
    tests: list[TaskEvent] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        """The run's name; of a folder without one, the folder's."""
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
        rows = mean_losses(self.evaluations, role, name)
        tokens = np.array([tokens for _, tokens, _ in rows], dtype=np.float64) - self.tokens_before
        return Curve(tokens, np.array([loss for *_, loss in rows], dtype=np.float64))

    def start_loss(self, role: str) -> float | None:
        """Loss of the start checkpoint: the evaluation before the first step. ``None`` where there was none."""
        losses = [e.loss for e in self.evaluations if e.role == role and e.step == self.first_step]
        return sum(losses) / len(losses) if losses and len(losses) == len(self.sets(role)) else None


def read_run(folder: Path | str) -> RecordedRun:
    """The run in ``folder``. Raises UserError if it has no readable metrics."""
    folder = Path(folder)
    path = folder / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{folder.absolute()}: no {path.name}: give the folder of a run that has trained at least one step")

    def damaged(line: int, what: str) -> None:
        raise UserError(f"{path}, line {line}: {what}")

    record = _Columns()
    lines = Lines(path, damaged)
    with open(path, "rb") as file:
        while chunk := file.readlines(_CHUNK):
            _take(chunk, lines, record)
    if not record.steps and not record.evaluations:
        raise NothingYet(f"{path}: no train and no eval line: the run ended before its first step")
    return RecordedRun(
        folder,
        read_settings(folder),
        record.start,
        record.columns(),
        list(record.evaluations.values()),
        record.events,
        tests=list(record.tests.values()),
    )


def in_one_unit(runs: Sequence[RecordedRun]) -> list[RecordedRun]:
    """The runs with validation losses that compare: in nats per token as they are, but in bits per byte where their tokenizers
    differ. Where one of them then lacks its bytes, all keep their losses, in the unit ``APART``."""
    unit = common_unit([(run.start, run.evaluations) for run in runs])
    if unit != BITS:
        return [dataclasses.replace(run, unit=unit) for run in runs] if unit != NATS else list(runs)
    return [dataclasses.replace(run, unit=BITS, evaluations=[in_bits(e) for e in run.evaluations]) for run in runs]


def common_unit(runs: Sequence[tuple[dict[str, Any], Collection[Evaluation]]]) -> str:
    """The unit in which validation losses of runs compare, by their start events and evaluations."""
    judged = [(start.get("tokenizer"), evaluations) for start, evaluations in runs if evaluations]
    if len({tokenizer for tokenizer, _ in judged if isinstance(tokenizer, str)}) < 2:
        return NATS
    known = all(evaluation.bits_per_byte is not None for _, evaluations in judged for evaluation in evaluations)
    return BITS if known else APART


def read_runs(folders: Sequence[Path | str]) -> list[RecordedRun]:
    """``read_run`` of each folder, in order, with losses ``in_one_unit``. Raises UserError for none, or for one given twice."""
    if not folders:
        raise UserError("no run to report: give at least one run folder")
    seen: set[Path] = set()
    for folder in folders:
        if (resolved := Path(folder).resolve()) in seen:
            raise UserError(f"{folder}: given twice: remove one")
        seen.add(resolved)
    return in_one_unit([read_run(folder) for folder in folders])


class _Columns(CountedEvents):
    """All that counts. Train lines are columns of numbers: there may be millions."""

    def __init__(self) -> None:
        super().__init__()
        self._columns = {name: array("d") for name in COLUMNS}
        self.steps = self._columns["step"]  # ascending
        self._others = [(name, column.append) for name, column in self._columns.items() if name != "step"]

    def add_step(self, step: int, event: dict[str, Any]) -> None:
        self.steps.append(step)
        for name, append in self._others:
            value = event.get(name)
            append(value if type(value) is float else number(value))

    def add_train(self, lines: Sequence[bytes]) -> bool:
        """Add train lines together, as ``add`` would one by one; False, without adding any, if they need its care."""
        try:
            events = orjson.loads(b"[" + b",".join(lines) + b"]")
            if len(events) != len(lines) or any(event["event"] != "train" for event in events):
                return False
            steps = [event["step"] for event in events]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            return False
        if set(map(type, steps)) != {int} or (self.step is not None and steps[0] <= self.step):
            return False
        if not all(map(int.__lt__, steps, steps[1:])):
            return False
        self.steps.extend(steps)
        self.step = steps[-1]
        for name, column in self._columns.items():
            if name != "step":
                values = [event.get(name) for event in events]
                column.extend(values if set(map(type, values)) <= {float, int} else map(number, values))
        return True

    def columns(self) -> dict[str, NDArray[np.float64]]:
        """The train lines' numbers by name, (steps,) float64, NaN where a line lacks one."""
        return {name: np.frombuffer(column) if column else np.empty(0) for name, column in self._columns.items()}

    def supersede(self, step: int) -> None:
        super().supersede(step)
        kept = bisect.bisect_right(self.steps, step)
        for column in self._columns.values():
            del column[kept:]
        self.step = int(self.steps[-1]) if self.steps else None


def _take(chunk: list[bytes], lines: Lines, record: _Columns) -> None:
    """Pass whole lines to ``record``: long rows of train lines together, which is several times as fast, others singly."""
    at = 0
    while at < len(chunk):
        end = at
        while end < len(chunk) and chunk[end].startswith(TRAIN_START):
            end += 1
        if end - at >= _ROW and lines.torn is None and record.add_train(chunk[at:end]):
            lines.number += end - at
            at = end
            continue
        for line in chunk[at : end + 1]:
            lines.take(line, record)
        at = end + 1
