"""The metrics of a run: metrics.jsonl (the source of truth), log.txt, TensorBoard, and Weights & Biases on request."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import sys
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import orjson

from megarewarm.config.execution import LoggingConfig
from megarewarm.errors import UserError
from megarewarm.record.layout import LOG_FILE, METRICS_FILE, RUN_FORMAT, TENSORBOARD
from megarewarm.training.output.tensorboard import Board


def check_loggers(config: LoggingConfig) -> None:
    """Raise ``UserError`` for a requested logger that is not installed."""
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise UserError("logging.wandb: the wandb package is not installed; pip install wandb, or remove the key")


class Metrics:
    """Append-only writer of events. Only the main rank has one that writes; the others' calls do nothing.

    A line is flushed to the operating system as soon as it is written, so a killed process loses none. ``has_past`` says
    that the file held lines of an earlier start of this run.
    """

    def __init__(self, folder: Path, config: LoggingConfig, name: str, *, writes: bool) -> None:
        self._writes = writes
        self._board = None
        self._wandb = None
        self.has_past = False
        self.listeners: list[Callable[[dict[str, Any]], object]] = []
        """Called with each event as it is written, on the rank that writes."""
        if not writes:
            return
        self._path, self._log_path = path, log_path = folder / METRICS_FILE, folder / LOG_FILE
        self.has_past = path.exists() and path.stat().st_size > 0
        # unbuffered: a buffer that a full disk refused would raise again when the file is closed
        self._file, self._log = _opened(path), _opened(log_path)
        _end_torn_line(path, self._file)
        if config.tensorboard:
            self._board = Board(folder / TENSORBOARD, self._warn)
        if config.wandb is not None:
            import wandb

            self._wandb = wandb.init(
                project=config.wandb.project, entity=config.wandb.entity, name=name, dir=str(folder), id=name, resume="allow"
            )

    def event(self, event: str, **values: Any) -> None:
        """Append one line ``{"event": event, "time": ..., **values}``, a start with its format. Non-finite numbers become null.

        Its curves go to TensorBoard and Weights & Biases as well, under the same names. Raises ``UserError`` if the disk
        refuses; no part of the line is left then.
        """
        if not self._writes:
            return
        if event == "start":
            values = {"format": RUN_FORMAT, **values}
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
        line = {"event": event, "time": round(time.time(), 3), **clean}
        _append(self._path, self._file, orjson.dumps(line) + b"\n")
        for listener in self.listeners:
            listener(line)
        if points := _points(event, values):
            if self._board is not None:
                self._board.scalars(values["step"], points)
            if self._wandb is not None:
                self._wandb.log(points, step=values["step"])

    def text(self, line: str) -> None:
        """A line of log.txt, with the time of day. Raises as ``event``."""
        if self._writes:
            _append(self._log_path, self._log, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n".encode())

    def close(self) -> None:
        """Flush and close everything."""
        if not self._writes:
            return
        if self._board is not None:
            self._board.close()
        self._file.close()
        self._log.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _warn(self, note: str) -> None:
        print(note, file=sys.stderr, flush=True)


def _points(event: str, values: dict[str, Any]) -> dict[str, float]:
    """The points that a line adds to curves over steps, by the curve's name: all numbers of a train line, the loss of an
    evaluation, the numbers of a test, and every measure of every group of weights."""
    if event == "train":
        numbers = {name: value for name, value in values.items() if name != "step" and not isinstance(value, bool)}
        return {f"train/{name}": value for name, value in numbers.items()}
    if event == "eval":
        return {f"validation/{values['name']}": values["loss"]}
    if event == "dynamics":
        groups = values["groups"].items()
        return {f"dynamics_{measure}/{group}": value for group, row in groups for measure, value in row.items()}
    if event == "task":
        return {f"task_{key}/{values['name']}": value for key, value in values.items() if isinstance(value, float)}
    if event == "value":
        return {f"value_{values['name']}/{source}": value for source, value in values["sources"].items()}
    return {}


def _opened(path: Path) -> FileIO:
    try:
        return open(path, "ab", buffering=0)
    except OSError as error:
        raise _refused(path, error) from error


def _append(path: Path, file: FileIO, line: bytes) -> None:
    """Append all of ``line``, or nothing of it and raise ``UserError``."""
    start, written = file.seek(0, 2), 0
    try:
        while written < len(line):  # a disk that is nearly full takes a part of it
            written += file.write(line[written:]) or 0
    except OSError as error:
        with contextlib.suppress(OSError):
            file.truncate(start)
        raise _refused(path, error) from error


def _refused(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: can't be written ({error.strerror or error}); make room and run the same command again: it continues "
        f"from the newest checkpoint"
    )


def _end_torn_line(path: Path, file: FileIO) -> None:
    """After a kill in mid-line, start the next event on a line of its own."""
    size = path.stat().st_size
    if size:
        with open(path, "rb") as handle:
            handle.seek(size - 1)
            if handle.read(1) != b"\n":
                _append(path, file, b"\n")
