"""Atomic writes: files and folders get their names only when their contents are on the disk. Also checksums of files.

An unfinished file is next to its final path, under a name that ends in ``PART``; a kill leaves only that.
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

# errors of file systems that can't sync a folder or a file; any other error means that the data may not be on the disk
_NO_SYNC = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EACCES, errno.EPERM, errno.EISDIR, errno.EBADF}


class NewFile:
    """A new file for ``path``; use it in a ``with`` statement, or ``close`` it. Creates the folder if it is missing.

    Write to ``file``, then ``publish`` it; otherwise nothing is kept. The methods raise ``OSError``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._part = path.with_name(f"{path.name}.{os.getpid()}{PART}")
        self.file = open(self._part, "wb", buffering=2**20)  # noqa: SIM115 - held until close

    def sync(self) -> None:
        """Flush what has been written to the disk."""
        sync(self.file)

    def publish(self) -> None:
        """Sync the file to the disk, then give it its name. Replaces an existing file."""
        self.sync()
        os.replace(self._part, self.path)

    def close(self) -> None:
        """Remove the file unless it was published."""
        with contextlib.suppress(OSError):  # a full disk, which was reported before; a synced file closes without an error
            self.file.close()
        self._part.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically: its name always refers to the old content or the new, never to a part."""
    with NewFile(path) as new:
        new.file.write(data)
        new.publish()


def move(source: Path, target: Path) -> None:
    """Move a file atomically. Across file systems, copies it next to ``target`` first, then renames the copy."""
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
    """Sync the folder ``new`` to the disk, then rename it to ``place``. ``make_room``: removes an existing folder, as late as
    possible. Raises ``OSError``."""
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
    """Flush and ``fsync``, if the file system supports it. Raises ``OSError`` if data may be lost."""
    file.flush()
    _fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """``fsync`` a folder, so that the names in it persist. Some file systems can't open one."""
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
