"""What a run writes down: metrics.jsonl (the source of truth), log.txt, TensorBoard, and Weights & Biases when asked."""

from __future__ import annotations

import importlib.util
import math
import time
from pathlib import Path
from typing import Any

import orjson

from megarewarm.config.execution import LoggingConfig
from megarewarm.config.run_format import RUN_FORMAT
from megarewarm.errors import UserError


def check_loggers(config: LoggingConfig) -> None:
    """Raise ``UserError`` for a logger that is asked for and not installed."""
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
        if not writes:
            return
        self._path = path = folder / "metrics.jsonl"
        self.has_past = path.exists() and path.stat().st_size > 0
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the run
        _end_torn_line(path, self._file)
        self._log = open(folder / "log.txt", "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"))
        if config.wandb is not None:
            import wandb

            self._wandb = wandb.init(
                project=config.wandb.project, entity=config.wandb.entity, name=name, dir=str(folder), id=name, resume="allow"
            )

    def event(self, event: str, **values: Any) -> None:
        """Append one line ``{"event": event, "time": ..., **values}``, a start with its format. Non-finite numbers become null.

        Raises ``UserError`` where the disk refuses; no part of the line is left then.
        """
        if not self._writes:
            return
        if event == "start":
            values = {"format": RUN_FORMAT, **values}
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
        line = orjson.dumps({"event": event, "time": round(time.time(), 3), **clean}) + b"\n"
        start, written = self._file.seek(0, 2), 0
        try:
            while written < len(line):  # a disk that is nearly full takes a part of it
                written += self._file.write(line[written:])
        except OSError as error:
            self._file.truncate(start)
            raise _refused(self._path, error) from error

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Send numbers to TensorBoard and Weights & Biases."""
        if self._board is not None:
            for key, value in values.items():
                self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def text(self, line: str) -> None:
        """A line of log.txt, with the time of day."""
        if self._writes:
            try:
                self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
            except OSError as error:
                raise _refused(self._path.with_name("log.txt"), error) from error

    def close(self) -> None:
        """Flush and close everything."""
        if not self._writes:
            return
        self._file.close()
        self._log.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _refused(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: can't be written ({error.strerror or error}); make room and run the same command again: it continues "
        f"from the newest checkpoint"
    )


def _end_torn_line(path: Path, file: Any) -> None:
    """After a kill in mid-line, start the next event on a line of its own."""
    size = path.stat().st_size
    if size:
        with open(path, "rb") as handle:
            handle.seek(size - 1)
            if handle.read(1) != b"\n":
                file.write(b"\n")
