"""The folder of a run: its resolved configuration, its metrics, its checkpoints. One process group at a time."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from megarewarm.checkpoint.own.folder import newest_whole
from megarewarm.config.load import dump
from megarewarm.config.run_identity import difference_of_runs
from megarewarm.config.schema import RunConfig
from megarewarm.config.yaml_text import read_yaml
from megarewarm.errors import UserError
from megarewarm.file_lock import FileLock
from megarewarm.files import write_whole
from megarewarm.parallel.agreement import on_all_ranks
from megarewarm.parallel.collective import collective
from megarewarm.record.layout import AVERAGE, BATCHES, CHECKPOINTS, CONFIG_FILE, EXPORT, METRICS_FILE, RUN_FORMAT, take_format


class RunFolder:
    """Paths of a run, and the lock that keeps a second process out of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / CONFIG_FILE
        self.metrics_file = path / METRICS_FILE
        self.checkpoints = path / CHECKPOINTS
        self.export = path / EXPORT
        self.average = path / AVERAGE
        self.batches = path / BATCHES
        self._lock: FileLock | None = None

    @collective
    def newest_checkpoint(
        self, *, alone: bool = False, up_to: int | None = None, counts: Callable[[Path], bool] = lambda _: True
    ) -> tuple[Path | None, list[str]]:
        """The newest intact checkpoint of this run, None before the first, and a note on each damaged one. ``up_to``: the
        latest step that counts; ``counts``: whether a checkpoint does. All ranks call it, unless ``alone``. Raises
        ``UserError`` if there are checkpoints and all are damaged."""
        return newest_whole(self.checkpoints, alone=alone, up_to=up_to, counts=counts)

    def check(self, config: RunConfig, *, experiment: str | None = None) -> None:
        """Raise ``UserError`` if the folder holds a run of another configuration, naming the first key that differs.
        ``experiment``: the folder of the experiment that the run is a part of, whose runs have their names from it."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: the run folder is a file; set 'folder' to another place")
        other = f"set the experiment's 'folder' (now {experiment}) to another place, or remove {self.path} to train it again"
        if not self.config_file.is_file():
            if self.metrics_file.exists() or self.checkpoints.exists():
                remedy = other if experiment is not None else "set 'name' or 'folder' to another place"
                raise UserError(f"{self.path}: holds a run without config.yaml; {remedy}")
            return
        old = take_format(read_yaml(self.config_file)[0], self.config_file)
        difference = difference_of_runs(old, config.model_dump(mode="json", by_alias=True))
        if difference is not None:
            key, before, now = difference
            place = "name" if config.folder is None else "folder"  # a folder that is given does not follow the name
            alone = f"give this run another '{place}', or continue the old one in a new run with start.from={self.path}"
            if key == "training.budget":
                alone = (
                    f"to train on, make it a new run: another '{place}', start.from={self.path}, start.intent=branch (the data "
                    f"go on, Adam's moments are kept, the schedule begins again) and as training.budget what is added"
                )
            remedy = other if experiment is not None else alone
            raise UserError(f"{self.path}: holds a run in which {key} was {before!r}, now it is {now!r}; {remedy}")

    def rule_of_intervals(self) -> str | None:
        """``intervals`` of the run that the folder holds: 'rounded' where it is older than the key; None without a run."""
        if not self.config_file.is_file():
            return None
        return str(read_yaml(self.config_file)[0].get("intervals", "rounded"))

    def micro_batch(self) -> int | None:
        """``training.micro_batch`` of the run that the folder holds; None without one."""
        training = read_yaml(self.config_file)[0].get("training") if self.config_file.is_file() else None
        size = training.get("micro_batch") if isinstance(training, dict) else None
        return size if isinstance(size, int) else None

    def check_writable(self) -> None:
        """Raise ``UserError`` if the folder can't be made or written to. Leaves nothing behind."""
        there = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        number = errno.ENOTDIR if not there.is_dir() else 0 if os.access(there, os.W_OK | os.X_OK) else errno.EACCES
        if number:
            raise self._refused(OSError(number, os.strerror(number), str(there)))
        if there != self.path:
            try:  # some file systems allow it and then refuse it
                tempfile.TemporaryFile(dir=there).close()
            except OSError as error:
                raise self._refused(OSError(error.errno, error.strerror, str(there))) from error
        most = os.pathconf(there, "PC_NAME_MAX")
        for name in self.path.absolute().parts:
            if len(os.fsencode(name)) > most:
                raise UserError(
                    f"{self.path}: '{name[:30]}...' has {len(os.fsencode(name))} bytes, names here have up to {most}: shorten "
                    f"the run's 'name' or 'folder' (in an experiment, the labels of its axes)"
                )

    def _refused(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: can't be written ({error}); make room, or set 'folder' to another place")

    @collective
    def lock(self, *, main: bool) -> None:
        """Lock an existing folder, so that no other process removes the checkpoints that are read next. All ranks call it,
        the main one locks; raises ``UserError`` on all of them if another process holds the lock."""
        self._on_main(self._lock_if_there, main)

    @collective
    def open(self, config: RunConfig, *, main: bool) -> None:
        """Make the folder, lock it unless it is locked, and write the resolved configuration. All ranks call it, the main
        one does it; raises ``UserError`` on all of them if that fails."""
        self._on_main(lambda: self._open(config), main)

    def _on_main(self, action: Callable[[], None], main: bool) -> None:
        try:
            on_all_ranks(action if main else None, OSError)
        except OSError as error:
            self.close()
            if isinstance(error, BlockingIOError):
                busy = f"{self.path}: another process is training in this folder; wait for it or set 'name'"
                raise UserError(busy) from error
            raise self._refused(error) from error

    def _lock_if_there(self) -> None:
        # whether the folder is writable is checked later: a complete run is only read
        if self.path.is_dir() and os.access(self.path, os.W_OK):
            self._take_lock()

    def _take_lock(self) -> None:
        self._lock = FileLock(self.path / ".lock")

    def _open(self, config: RunConfig) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._take_lock()
        write_whole(self.config_file, f"format: {RUN_FORMAT}\n{dump(config)}".encode())

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
