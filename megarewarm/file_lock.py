"""One process at a time in a folder, also on file systems that have no locks.

Lustre without ``-o flock``, some FUSE and parallel file systems refuse ``flock``. There a file names the owning process: on the
same machine the lock checks whether it lives; on another one it can't, and logs a warning.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import IO

log = logging.getLogger(__name__)

# errors of file systems that have no locks, or whose lock service does not run
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL, errno.ENOTTY, errno.EPERM}
# errors if another process has the lock: EACCES where flock is implemented with POSIX locks
_TAKEN = {errno.EWOULDBLOCK, errno.EACCES}


class FileLock:
    """An exclusive lock on the file ``path``, which it creates; use it in a ``with`` statement or ``close`` it.

    Raises ``BlockingIOError`` if another process has it, unless ``wait``; ``OSError`` if the file can't be created. If the
    file system has no locks, a warning explains what guards the folder instead.
    """

    def __init__(self, path: Path, *, wait: bool = False) -> None:
        self._owner: Path | None = None
        self._file: IO[bytes] = open(path, "ab")  # noqa: SIM115 - held until close
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except OSError as error:
                if error.errno in _TAKEN:
                    raise BlockingIOError(errno.EWOULDBLOCK, "another process holds the lock", str(path)) from error
                if error.errno not in _NO_LOCKS:
                    raise
                self._own(path.with_name(f"{path.name}.owner"), error, wait)
        except BaseException:
            self._file.close()
            raise

    @property
    def locked(self) -> bool:
        """Whether the file system itself holds the lock."""
        return self._owner is None

    def _own(self, owner: Path, error: OSError, wait: bool) -> None:
        me, waited_for = identity(os.getpid()), False
        while not _made(owner, me):
            other = _read(owner)
            if other is not None and is_alive(other):
                if not wait:
                    raise BlockingIOError(errno.EWOULDBLOCK, f"process {other['process']} on this machine holds it", str(owner))
                time.sleep(0.2)
                continue
            if other is not None and not _is_near(other):
                log.warning(
                    "%s: process %s on %s used this folder and did not release it: make sure that it has ended",
                    owner,
                    other["process"],
                    other["host"],
                )
            with contextlib.suppress(FileNotFoundError):
                owner.unlink()
            waited_for = True
        if waited_for:
            time.sleep(0.5)  # another process may have seen the old owner too, and have replaced this one
            if _read(owner) != me:
                return self._own(owner, error, wait)
        self._owner = owner
        log.warning(
            "%s: this file system has no locks (%s): a second process is detected on this machine only; don't start one in "
            "this folder on another machine",
            owner.parent,
            error.strerror,
        )

    def close(self) -> None:
        """Release the lock."""
        if self._owner is not None and _read(self._owner) == identity(os.getpid()):
            with contextlib.suppress(OSError):
                self._owner.unlink()
        self._file.close()

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


Owner = dict[str, str | int]


def identity(process: int) -> Owner:
    """Identifies a process uniquely: a process number alone is reused, and each container has its own numbers."""
    said: Owner = {"host": socket.gethostname(), "process": process, "boot": "", "namespace": "", "born": ""}
    with contextlib.suppress(OSError):
        said["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        said["namespace"] = os.readlink("/proc/self/ns/pid")
        # field 22 of /proc/PID/stat is the start time
        said["born"] = (
            Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        )
    return said


def _is_near(other: Owner) -> bool:
    """Whether its process, if alive, is visible from here."""
    me = identity(os.getpid())
    return all(other[key] == me[key] for key in ("host", "boot", "namespace"))


def is_alive(other: Owner) -> bool:
    """Whether the process of that ``identity`` is alive and visible from here. Ignores additional keys."""
    return (
        _is_near(other)
        and Path(f"/proc/{other['process']}").exists()
        and (identity(int(other["process"])).items() <= other.items())
    )


def _made(owner: Path, me: Owner) -> bool:
    try:
        # O_EXCL is the one operation that every file system grants to one process only
        descriptor = os.open(owner, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with open(descriptor, "w", encoding="ascii") as file:
        file.write(json.dumps(me))
    return True


def _read(owner: Path) -> Owner | None:
    """The owner that the file names; None if there is none, after a wait for one that is just being written."""
    for _ in range(5):
        try:
            said = json.loads(owner.read_bytes())
            if isinstance(said, dict) and said.keys() >= {"host", "process", "boot", "namespace", "born"}:
                return {key: said[key] for key in ("host", "process", "boot", "namespace", "born")}
        except FileNotFoundError:
            return None
        except ValueError:
            pass
        time.sleep(0.1)
    return None
