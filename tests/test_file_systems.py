"""Whole runs on a file system that lacks calls, as those of clusters do: by a library that makes the calls fail."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from megarewarm.checkpoint.export.replace import new_folder
from megarewarm.checkpoint.own.folder import is_checkpoint
from megarewarm.checkpoint.own.store import remove, set_aside
from megarewarm.checkpoint.weights import unreadable
from megarewarm.data.text.tokenizers import train_bpe
from megarewarm.errors import UserError
from megarewarm.main import main
from tests.support.tiny import events, mapping

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
    changes = {"training": {"budget": 6}, "checkpoint": {"every": 2, "keep_last": 2}, "export": {"huggingface": True}}
    path = place / "run.yml"
    path.write_text(yaml.safe_dump(mapping(place, name="lacking", folder=str(place / "lacking"), **changes)))
    return path


NFS = {"flock": errno.ENOLCK, "fsync": errno.EINVAL, "chmod": errno.EPERM, "utime": errno.EPERM, "rmdir": errno.ENOTEMPTY}
FUSE = {"flock": errno.ENOSYS, "fsync": errno.ENOSYS, "link": errno.EOPNOTSUPP, "mmap": errno.ENODEV, "rmdir": errno.EBUSY}
FUSE |= {"rename": errno.EXDEV}


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
    export = tmp_path / "lacking" / "huggingface"
    assert load_file(export / "model.safetensors") and json.loads((export / "config.json").read_text())


def test_text_is_prepared_where_files_only_move_within_their_folder(tmp_path: Path, shim: Path) -> None:
    """As between the quotas of projects, the servers of some parallel file systems, and what mergerfs joins."""
    text, tokenizer = tmp_path / "a.txt", tmp_path / "tokenizer.json"
    text.write_text("some words\n" * 50)
    train_bpe(["some words"], 258, tokenizer)
    for name, fails in (("plain", ""), ("lacking", f"rename={errno.EXDEV}")):
        words = [sys.executable, "tools/preprocess_data.py", str(text), "--tokenizer", str(tokenizer)]
        environ = os.environ | {"LD_PRELOAD": str(shim), "FAILS": fails}
        done = subprocess.run(
            [*words, "--output", str(tmp_path / name)], cwd=ROOT, env=environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    for suffix in ("bin", "idx", "json"):
        assert (tmp_path / f"plain.{suffix}").read_bytes() == (tmp_path / f"lacking.{suffix}").read_bytes()
    assert len(list(tmp_path.iterdir())) == 8, "and nothing else is left"


def renaming(monkeypatch: pytest.MonkeyPatch, number: int, name: str) -> None:
    """Renaming of anything called ``name`` fails."""
    rename = os.rename

    def failing(source: os.PathLike[str], target: os.PathLike[str]) -> None:
        if Path(source).name == name:
            raise OSError(number, os.strerror(number), str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)


def write_into(folder: Path, word: str) -> None:
    with new_folder(folder, lambda there: (there / "old").exists()) as new:
        (new / word).write_text(word)
        (new / "deep").mkdir()
        (new / "deep" / word).write_text(word)


def content(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV])
def test_a_folder_that_can_not_be_renamed_gets_another_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """One that is mounted, or came with the image of a container."""
    write_into(tmp_path / "out", "old")
    renaming(monkeypatch, number, "out")
    write_into(tmp_path / "out", "new")
    assert content(tmp_path) == ["out", "out/deep", "out/deep/new", "out/new"]


def test_a_mounted_folder_is_written_from_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    for word in ("old", "new"):
        write_into(tmp_path / "out", word)
        assert content(tmp_path / "out") == ["deep", f"deep/{word}", word]


def test_an_export_goes_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "big" / "out")
    for word in ("old", "new"):
        write_into(tmp_path / "out", word)
    assert (tmp_path / "out").is_symlink() and content(tmp_path / "big" / "out") == ["deep", "deep/new", "new"]


def test_what_was_exported_before_stays_where_the_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_into(tmp_path / "out", "old")
    renaming(monkeypatch, errno.EIO, "new")
    with pytest.raises(UserError, match="out: can't be written"):
        write_into(tmp_path / "out", "new")
    assert content(tmp_path) == ["out", "out/deep", "out/deep/old", "out/old"]


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EIO])
def test_a_checkpoint_that_can_not_be_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    checkpoint = tmp_path / "step_2"
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text("{}")
    renaming(monkeypatch, number, "step_2")
    if number == errno.EIO:
        with pytest.raises(OSError, match="Input/output"):
            set_aside(checkpoint, tmp_path / "step_2.partial")
        assert is_checkpoint(checkpoint)
    else:
        set_aside(checkpoint, tmp_path / "step_2.partial")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [{"folder": f"runs/{'b' * 256}/x"}, {"name": "n" * 256, "folder": None}])
def test_names_that_no_file_system_takes_are_refused_by_the_dry_run(
    tmp_path: Path, change: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "run.yml"
    place.write_text(yaml.safe_dump({k: v for k, v in (mapping(tmp_path) | change).items() if v is not None}))
    for more in (["--dry-run"], []):
        assert main([str(place), *more]) == 2
        assert "has 256 bytes, names here have up to 255: shorten" in capsys.readouterr().err


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
