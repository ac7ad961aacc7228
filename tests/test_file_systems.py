"""Whole runs on a file system that lacks calls, as those of clusters do: by a library that makes the calls fail."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import events, mapping

from megarewarm.checkpoint.own.store import remove
from megarewarm.checkpoint.weights import unreadable

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not here")
    library = tmp_path_factory.mktemp("shim") / "file_system.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", str(library), str(ROOT / "tests/fixtures/file_system.c"), "-ldl"], check=True
    )
    return library


def run(shim: Path, config: Path, fails: dict[str, int], under: str = "") -> subprocess.CompletedProcess[str]:
    environ = os.environ | {
        "LD_PRELOAD": str(shim),
        "FAILS": " ".join(f"{name}={number}" for name, number in fails.items()),
        "FAILS_UNDER": str(config.parent / under),
        "MEGAREWARM_CACHE": str(config.parent / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    words = [sys.executable, "launch.sh", str(config)]
    return subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120, check=False)


def config(place: Path) -> Path:
    changes = {"training": {"budget": 6}, "checkpoint": {"every": 2, "keep_last": 2}}
    path = place / "run.yml"
    path.write_text(yaml.safe_dump(mapping(place, name="lacking", folder=str(place / "lacking"), **changes)))
    return path


NFS = {"flock": errno.ENOLCK, "fsync": errno.EINVAL, "chmod": errno.EPERM, "utime": errno.EPERM, "rmdir": errno.ENOTEMPTY}
FUSE = {"flock": errno.ENOSYS, "fsync": errno.ENOSYS, "link": errno.EOPNOTSUPP, "mmap": errno.ENODEV, "rmdir": errno.EBUSY}


@pytest.mark.parametrize("fails", [NFS, FUSE], ids=["nfs", "fuse"])
def test_a_run_goes_on_and_is_resumed(tmp_path: Path, shim: Path, fails: dict[str, int]) -> None:
    path = config(tmp_path)
    first = run(shim, path, fails)
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stderr.count("this file system has no locks") == 1 and "not removed yet" in first.stderr
    checkpoints = tmp_path / "lacking" / "checkpoints"
    shutil.rmtree(checkpoints / "step_6")
    again = run(shim, path, fails)
    assert again.returncode == 0 and "resumes at step 4" in again.stdout, again.stdout + again.stderr
    assert sorted({line["step"] for line in events(tmp_path / "lacking", "train")}) == [1, 2, 3, 4, 5, 6]
    assert (checkpoints / "step_6" / "state.json").is_file() and not (checkpoints / "step_2").exists()


def test_a_disk_that_may_have_lost_data_ends_the_run(tmp_path: Path, shim: Path) -> None:
    ended = run(shim, config(tmp_path), {"fsync": errno.EIO}, under="lacking/checkpoints")
    assert ended.returncode == 2 and "step_2: the checkpoint could not be written" in ended.stderr, ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("number", [errno.ENOTEMPTY, errno.EBUSY, errno.EACCES])
def test_a_folder_with_a_file_that_is_still_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def rmdir(*words: object, **more: object) -> None:
        raise OSError(number, os.strerror(number))

    folder = tmp_path / "step_2.partial"
    for _ in range(2):
        folder.mkdir()
        (folder / "x").write_text("x")
        with monkeypatch.context() as patched:
            patched.setattr(os, "rmdir", rmdir)
            if number == errno.EACCES:
                with pytest.raises(PermissionError):
                    remove(folder)
                return
            remove(folder)
        assert not folder.exists(), "its name is free"
    left = sorted(tmp_path.iterdir())
    assert [path.name for path in left] == ["step_2-left0.partial", "step_2-left1.partial"]
    for path in left:
        remove(path)
    assert not list(tmp_path.iterdir())


def test_files_that_can_not_be_mapped_are_not_called_damaged(tmp_path: Path) -> None:
    reason = f"{os.strerror(errno.ENODEV)} (os error 19)"
    assert "can't map files into memory" in str(unreadable(tmp_path / "a.safetensors", "safetensors file", reason))
