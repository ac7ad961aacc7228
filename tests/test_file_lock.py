"""One process at a time, with flock and on file systems that answer that they have none."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megarewarm import file_lock
from megarewarm.file_lock import FileLock, identity
from megarewarm.files import sync_folder


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_second_one_is_refused_and_the_next_is_not(tmp_path: Path) -> None:
    with FileLock(tmp_path / "lock") as first, pytest.raises(BlockingIOError):
        assert first.locked
        FileLock(tmp_path / "lock")
    FileLock(tmp_path / "lock").close()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EPERM])
def test_without_locks_a_second_one_on_this_machine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    refuse(monkeypatch, number)
    with FileLock(tmp_path / "lock") as first:
        assert not first.locked and "this file system has no locks" in caplog.text
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on this machine"):
            FileLock(tmp_path / "lock")
    FileLock(tmp_path / "lock").close()
    assert not list(tmp_path.glob("*.owner"))


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES])
def test_taken_is_not_taken_for_unsupported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    refuse(monkeypatch, number)
    with pytest.raises(BlockingIOError):
        FileLock(tmp_path / "lock")
    assert not list(tmp_path.glob("*.owner"))


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.ESTALE])
def test_what_a_broken_disk_says_is_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    refuse(monkeypatch, number)
    with pytest.raises(OSError, match=os.strerror(number)):
        FileLock(tmp_path / "lock")
    monkeypatch.setattr(os, "fsync", lambda descriptor: fcntl.flock(descriptor, 0))
    with pytest.raises(OSError, match=os.strerror(number)):
        sync_folder(tmp_path)


def test_a_killed_owner_does_not_stay_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.ENOSYS)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    (tmp_path / "lock.owner").write_text(file_lock.json.dumps(identity(child.pid)))
    with pytest.raises(BlockingIOError, match=f"process {child.pid}"):
        FileLock(tmp_path / "lock")
    child.kill()
    child.wait()
    FileLock(tmp_path / "lock").close()


def test_an_owner_elsewhere_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse(monkeypatch, errno.ENOSYS)
    (tmp_path / "lock.owner").write_text(file_lock.json.dumps({**identity(os.getpid()), "host": "node7", "boot": "other"}))
    with caplog.at_level(logging.WARNING):
        FileLock(tmp_path / "lock").close()
    assert "on node7 used this folder" in caplog.text and socket.gethostname() != "node7"


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"host": "a"}'])
def test_a_damaged_owner_file_does_not_stay_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    refuse(monkeypatch, errno.ENOSYS)
    (tmp_path / "lock.owner").write_text(content)
    FileLock(tmp_path / "lock").close()


def test_who_waits_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.ENOSYS)
    first = FileLock(tmp_path / "lock")
    came: list[float] = []
    waiting = threading.Thread(target=lambda: (FileLock(tmp_path / "lock", wait=True).close(), came.append(time.monotonic())))
    waiting.start()
    time.sleep(0.5)
    assert not came
    first.close()
    waiting.join(20)
    assert came
