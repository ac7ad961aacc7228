"""Files and folders that appear whole or not at all: they get their names when all of them is on the disk; checksums of files.

What is being written lies beside its place, under a name that ends in ``PART``; a kill leaves that and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Self

PART = ".part"

# what file systems answer that can't sync a folder or a file; any other error means that the data may not be on the disk
_NO_SYNC = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EACCES, errno.EPERM, errno.EISDIR, errno.EBADF}


class NewFile:
    """A file on its way to ``path``; use it in a ``with`` statement, or ``close`` it. Its folder is made where it is missing.

    Write to ``file``, then ``publish`` it; without that nothing is left. The methods raise ``OSError``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._part = path.with_name(f"{path.name}.{os.getpid()}{PART}")
        self.file = open(self._part, "wb", buffering=2**20)  # noqa: SIM115 - held until close

    def sync(self) -> None:
        """Bring onto the disk what has been written."""
        sync(self.file)

    def publish(self) -> None:
        """Give the file its name, once it is on the disk. What stood there is replaced."""
        self.sync()
        os.replace(self._part, self.path)

    def close(self) -> None:
        """Remove what has not been published."""
        with contextlib.suppress(OSError):  # of a full disk, which has been reported; a synced file closes without one
            self.file.close()
        self._part.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def write_whole(path: Path, data: bytes) -> None:
    """Write a whole file: under its name there is the old content or the new, never a part of it."""
    with NewFile(path) as new:
        new.file.write(data)
        new.publish()


def move(source: Path, target: Path) -> None:
    """Give a whole file another name, also on another file system: there by a copy beside it, which then gets the name."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with open(source, "rb") as old, NewFile(target) as new:
            while block := old.read(2**22):
                new.file.write(block)
            new.publish()
        source.unlink()


def publish_folder(new: Path, place: Path, make_room: Callable[[], object]) -> None:
    """Give the folder ``new`` the name ``place``, once all in it is on the disk. ``make_room``: removes what stands there, as
    late as can be. Raises ``OSError``."""
    for file in new.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                sync(handle)
    sync_folder(new)
    make_room()
    new.rename(place)
    sync_folder(place.parent)


def sha256(*parts: Path) -> str:
    """SHA-256 of the bytes of files, one after another, in hexadecimal. Raises ``OSError``."""
    digest = hashlib.sha256()
    for part in parts:
        with open(part, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def sync(file: IO[bytes]) -> None:
    """Flush and ``fsync``, where the file system has it. Raises ``OSError`` for what means that data may be lost."""
    file.flush()
    _fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """``fsync`` of a folder, so that the names in it stay; not all file systems open one."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
        return
    try:
        _fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
