"""Files and folders appear whole or not at all, and only when they are on the disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megarewarm.files import NewFile, move, publish_folder, sync, sync_folder, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_has_its_old_content_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_whole(path, b"old")
    with NewFile(path) as new:
        new.file.write(b"new")
        assert path.read_bytes() == b"old"
        new.publish()
        assert path.read_bytes() == b"new"
    with pytest.raises(KeyError), NewFile(path) as new:
        new.file.write(b"never")
        raise KeyError
    with NewFile(path) as new:
        new.file.write(b"not published")
    assert path.read_bytes() == b"new" and names(path.parent) == ["file"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")
    path.with_name(f"file.{os.getpid()}.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_a_file_that_can_not_be_synced_keeps_its_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "a").touch()
    (tmp_path / "old").mkdir()
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output"):
        write_whole(tmp_path / "file", b"new")
    with pytest.raises(OSError, match="Input/output"):
        publish_folder(tmp_path / "new", tmp_path / "old", lambda: pytest.fail("too early"))
    assert (tmp_path / "file").read_bytes() == b"old" and names(tmp_path) == ["file", "new", "old"]


def test_a_folder_makes_room_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    (tmp_path / "new" / "deep").mkdir(parents=True)
    (tmp_path / "new" / "deep" / "a").touch()
    (tmp_path / "place").mkdir()
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("synced"), fsync(descriptor)))
    publish_folder(tmp_path / "new", tmp_path / "place", lambda: (done.append("room"), (tmp_path / "place").rmdir()))
    assert names(tmp_path) == ["place"] and (tmp_path / "place" / "deep" / "a").is_file()
    assert done == ["synced", "synced", "room", "synced"]


def test_a_file_moves_to_another_file_system_by_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if source.name == "from":
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        replace(source, target)

    (tmp_path / "from").write_bytes(b"content")
    monkeypatch.setattr(os, "replace", refuse)
    move(tmp_path / "from", tmp_path / "to")
    assert names(tmp_path) == ["to"] and (tmp_path / "to").read_bytes() == b"content"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_folder_that_can_not_be_synced_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    sync_folder(tmp_path)
    with open(tmp_path / "x", "wb") as file:
        sync(file)
