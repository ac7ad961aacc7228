"""A pool of open files: a blend may have thousands of sources, a process often no more than 1,024 files."""

from __future__ import annotations

import itertools
import os
import resource
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megarewarm.errors import UserError

_MOST = 4096


class OpenFiles:
    """Files of which at most ``most`` are open: who was not read for longest is closed, and opened again when it is read.
    Any thread may use it. A file that is being read stays open."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._numbers = itertools.count()
        self._open: OrderedDict[int, int] = OrderedDict()  # number of a file -> descriptor, the last used one at the end
        self._in_use: Counter[int] = Counter()
        self._lock = threading.RLock()  # a file may be forgotten, by the garbage collector, amid any statement below

    def number(self) -> int:
        """The file's name in messages."""
        return next(self._numbers)

    @contextmanager
    def descriptor(self, number: int, path: Path, state: tuple[int, int]) -> Iterator[int]:
        """An open descriptor of ``path``. ``state``: (size, time of change in ns) when it was opened first. Raises
        ``UserError`` if the file is another one by now, or gone."""
        with self._lock:
            descriptor = self._open.get(number)
            if descriptor is None:
                self._close_all_but(self._most - 1)
                descriptor = self._reopened(path, state)
                self._open[number] = descriptor
            else:
                self._open.move_to_end(number)
            self._in_use[number] += 1
        try:
            yield descriptor
        finally:
            with self._lock:
                self._in_use[number] -= 1

    def forget(self, number: int) -> None:
        """Close a file that will not be read again."""
        with self._lock:
            self._in_use.pop(number, None)
            descriptor = self._open.pop(number, None)
            if descriptor is not None:
                os.close(descriptor)

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    def _close_all_but(self, count: int) -> None:
        for number in list(self._open):
            if len(self._open) <= count:
                return
            if not self._in_use[number] and (descriptor := self._open.pop(number, None)) is not None:
                os.close(descriptor)

    @staticmethod
    def _reopened(path: Path, state: tuple[int, int]) -> int:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise UserError(f"{path} is gone, while it was in use: don't move it during a run") from None
        status = os.fstat(descriptor)
        if (status.st_size, status.st_mtime_ns) != state:
            os.close(descriptor)
            raise UserError(f"{path} has changed while it was in use: don't write to it during a run")
        return descriptor


def _room() -> int:
    """Half of what the process may have open: the rest is for checkpoints, sockets and libraries."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else max(1, min(_MOST, soft // 2))


OPEN_FILES = OpenFiles(_room())


def kept(owner: object) -> int:
    """A number for the file of ``owner``, which is closed when ``owner`` is gone."""
    number = OPEN_FILES.number()
    weakref.finalize(owner, OPEN_FILES.forget, number)
    return number
