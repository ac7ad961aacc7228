"""How commands end: no traceback, one line and an exit code, whatever the locale, the home, the pipes, the keys."""

from __future__ import annotations

import ast
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megarewarm.arguments import DTYPES, FORMS
from megarewarm.checkpoint import convert
from megarewarm.main import main
from megarewarm.parallel.connect import connect
from megarewarm.parallel.launchers import Launch
from megarewarm.process import is_out_of_memory
from megarewarm.training.trainer import train
from tests.support.tiny import config, mapping, quiet

ROOT = Path(__file__).resolve().parent.parent
TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py") if path.name != "find_megarewarm.py")
LATIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "latin-1"}
POSIX = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with token files, a run that is complete, its YAML, and an experiment's."""
    folder = tmp_path_factory.mktemp("place")
    settings = mapping(folder, training={"budget": 6}, evaluation={"every": 3})
    (folder / "run.yml").write_text(yaml.safe_dump(settings))
    train(config(folder, training={"budget": 6}, evaluation={"every": 3}), _alone(), quiet())
    (folder / "text.txt").write_text("schöne Grüße, ein langer Text\n" * 200, encoding="utf-8")
    return folder


def _alone():
    return connect(Launch(0, 1, 0, 1, "127.0.0.1", 29500, "none"), "cpu", 1)


def command(name: str, *words: Any) -> list[str]:
    return [sys.executable, str(ROOT / name), *map(str, words)]


def commands(place: Path, out: Path) -> dict[str, list[str]]:
    """A command of every tool that does its work, writing below ``out``."""
    run = place / "tiny"
    return {
        "launch": command("launch.sh", place / "run.yml", f"folder={out / 'run'}"),
        "dry run": command("launch.sh", place / "run.yml", "--dry-run"),
        "convert_checkpoint": command("tools/convert_checkpoint.py", run, out / "hf", "--to", "hf"),
        "inspect_checkpoint": command("tools/inspect_checkpoint.py", run, "--norms"),
        "merge_checkpoints": command("tools/merge_checkpoints.py", out / "merged", "--mean", run, run),
        "grow_checkpoint": command("tools/grow_checkpoint.py", run, out / "grown", "--width", 2),
        "merge_data": command("tools/merge_data.py", place / "old", place / "new", "--output", out / "both"),
        "inspect_data": command("tools/inspect_data.py", place / "old"),
        "train_tokenizer": command(
            "tools/train_tokenizer.py", place / "text.txt", "--vocab-size", 280, "--output", out / "tokenizer.json"
        ),
        "report": command("tools/report.py", run, "--output", out / "report"),
        "watch": command("tools/watch.py", run, "--once"),
        "replay_batch": command("tools/replay_batch.py", run, "--out", out / "batch.json", "--device", "cpu"),
        "draw_schedules": command("tools/draw_schedules.py", out / "schedules.png"),
        "plan_layout": command("tools/plan_layout.py", place / "run.yml", "--gpus", 2, "--gpu", "h100-80gb"),
    }


COMMANDS = list(commands(Path(), Path()))
OFTEN = ("launch", "dry run", "convert_checkpoint", "inspect_data", "report")
"""Tried at every change; the others, which end by the same lines of process.py, in the slow tests."""


def marked(names: list[str]) -> list[Any]:
    return [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in names]


def ended(words: list[str], **changes: Any) -> subprocess.CompletedProcess[bytes]:
    environment = dict(os.environ) | changes.pop("env", {})
    done = subprocess.run(words, capture_output="stdout" not in changes, env=environment, timeout=120, check=False, **changes)
    assert b"Traceback" not in (done.stderr or b""), done.stderr.decode()
    return done


@pytest.mark.parametrize("tool", TOOLS)
def test_help_costs_no_torch_and_writes_nothing(tool: str) -> None:
    script = "import runpy, sys\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\nfinally: print('torch' in sys.modules)"
    path = str(ROOT / "tools" / tool)
    setup = f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); sys.argv = [{path!r}, '--help']\n{script}"
    docs = {path: path.stat().st_mtime_ns for path in (ROOT / "docs").iterdir()}
    done = ended([sys.executable, "-c", setup])
    assert done.returncode == 0 and done.stdout.startswith(b"usage:") and done.stdout.endswith(b"False\n")
    assert {path: path.stat().st_mtime_ns for path in (ROOT / "docs").iterdir()} == docs


@pytest.mark.parametrize("name", marked(COMMANDS))
def test_any_locale(place: Path, tmp_path: Path, name: str) -> None:
    done = ended(commands(place, tmp_path)[name], env=LATIN)
    assert done.returncode == 0, done.stderr
    done.stdout.decode("latin-1").encode("latin-1")
    if name in ("dry run", "inspect_data"):
        assert ended(commands(place, tmp_path)[name], env=POSIX).stdout.isascii()


@pytest.mark.parametrize("name", marked([name for name in COMMANDS if name not in ("dry run", "plan_layout", "watch")]))
def test_an_output_place_that_takes_nothing(place: Path, tmp_path: Path, name: str) -> None:
    """A file where a folder should be."""
    (tmp_path / "file").write_text("")
    words = commands(place, tmp_path / "file")[name]
    if not any(str(tmp_path) in word for word in words):
        return
    done = ended(words)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, (done.returncode, done.stderr)
    assert str(tmp_path / "file").encode() in done.stderr


@pytest.mark.parametrize("name", marked(["dry run", "inspect_checkpoint", "inspect_data", "watch", "plan_layout", "report"]))
def test_a_reader_that_has_seen_enough(place: Path, tmp_path: Path, name: str) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    done = ended(commands(place, tmp_path)[name], stdout=writes, stderr=subprocess.PIPE)
    os.close(writes)
    assert done.returncode == 141 and done.stderr == b""


def test_a_run_goes_on_without_its_reader(place: Path, tmp_path: Path) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    done = ended(commands(place, tmp_path)["launch"], stdout=writes, stderr=subprocess.PIPE)
    os.close(writes)
    assert done.returncode == 0 and done.stderr == b""
    assert (tmp_path / "run" / "checkpoints" / "step_6").is_dir()


def test_output_on_a_full_disk(place: Path, tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = ended(commands(place, tmp_path)["inspect_data"], stdout=full, stderr=subprocess.PIPE)
        assert done.returncode == 2 and b"No space left" in done.stderr and done.stderr.count(b"\n") == 1
        assert ended(commands(place, tmp_path)["launch"], stdout=full, stderr=subprocess.PIPE).returncode == 0


def test_closed_streams(place: Path, tmp_path: Path) -> None:
    for name in ("launch", "inspect_checkpoint"):
        shell = " ".join(commands(place, tmp_path)[name]) + " <&- >&- 2>&-"
        assert ended(["sh", "-c", shell]).returncode == 0


@pytest.mark.parametrize("name", marked(["launch", "dry run", "convert_checkpoint", "report", "watch", "plan_layout"]))
@pytest.mark.parametrize("after", [0.3, 1.0])
def test_ctrl_c(place: Path, tmp_path: Path, name: str, after: float) -> None:
    """At any moment after Python itself has started: while modules are imported and later."""
    words = commands(place, tmp_path)[name]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    if b"site" in err or b"encodings" in err or process.returncode == -signal.SIGINT:
        pytest.skip("it came before the first line of the command")
    assert process.returncode in (0, 130) and b"Traceback" not in err, (process.returncode, err.decode())


def test_freed_memory_is_kept_where_asked_for() -> None:
    """Counted in page faults of allocations of 40 MiB, which take 10,240 each from the system; inside, and again outside."""
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("needs glibc")
    program = """
import sys, resource
from megarewarm.process import freed_memory_kept
def faults(size):
    found = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        piece = b"x" * (size << 20)
        del piece
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(found)
print(faults(40))
with freed_memory_kept(): print(faults(40))
print(faults(40), faults(4))
"""
    before, inside, after, small = map(int, subprocess.check_output([sys.executable, "-c", program]).split())
    assert inside < 100 and small < 100, "kept inside; and small pieces afterwards, as glibc's own rule does"
    assert before > 10_000 and after > 10_000, "the system takes large pieces back"


def test_ctrl_c_is_130_and_a_line(tmp_path: Path) -> None:
    """In main, in an import that catches what it can, and while the interpreter ends."""
    program = """
import sys, os, signal
from megarewarm.process import begin, importing, run
begin()
def raised(): os.kill(os.getpid(), signal.SIGINT)
def main():
    if sys.argv[1] == "main": raised()
    with importing():
        try:
            if sys.argv[1] == "import": raised()
        except BaseException: pass
    class Removed:
        def __del__(self): raised()
    if sys.argv[1] == "del": x = Removed(); del x
    return 0
run(main)
"""
    for moment in ("main", "import", "del"):
        done = ended([sys.executable, "-c", program, moment])
        assert (done.returncode, done.stderr) == (130, b"stopped\n"), moment


def test_without_a_home_and_a_name(place: Path, tmp_path: Path) -> None:
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("takes another user's number: needs root and setpriv")
    work = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    try:
        shutil.copytree(place, work / "place")
        for path in [work, *work.rglob("*")]:
            path.chmod(0o777)
        settings = (work / "place" / "run.yml").read_text().replace(str(place), str(work / "place"))
        (work / "place" / "run.yml").write_text(settings)
        free = [
            "env",
            "-u",
            "HOME",
            "-u",
            "XDG_CACHE_HOME",
            "-u",
            "MEGAREWARM_CACHE",
            "setpriv",
            "--reuid=54321",
            "--clear-groups",
        ]
        try:
            subprocess.run([*free, sys.executable, "-c", "import torch"], check=True, capture_output=True)
        except subprocess.CalledProcessError:
            pytest.skip("another user can't read this Python")
        words = commands(work / "place", work / "out")
        (work / "out").mkdir(mode=0o777)
        (work / "out").chmod(0o777)
        for name in ("launch", "report"):
            done = ended([*free, *words[name], *(["data.order=neox"] if name == "launch" else [])], cwd=work)
            assert done.returncode == 0, done.stderr
        assert not (work / "~").exists()
    finally:
        shutil.rmtree(work)


@pytest.mark.parametrize("key", ["training.seed", "data.seed"])
@pytest.mark.parametrize("seed", [-1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64, 10**30])
@pytest.mark.parametrize("order", ["permuted", "neox", "megatron"])
def test_every_seed_trains_or_is_refused_by_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, key: str, seed: int, order: str
) -> None:
    if key == "training.seed" and order != "permuted":
        return
    monkeypatch.setenv("MEGAREWARM_CACHE", "")
    (tmp_path / "run.yml").write_text(yaml.safe_dump(mapping(tmp_path, training={"budget": 1}, evaluation={"every": 1})))
    right = 0 <= seed < (2**63 if order == "permuted" else 2**32)
    assert main([str(tmp_path / "run.yml"), f"{key}={seed}", f"data.order={order}"]) == (0 if right else 2)
    if not right:
        err = capfd.readouterr().err
        assert err.count("\n") == 1 and key in err


def test_out_of_memory_is_a_line_with_what_to_do(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megarewarm.training.trainer.training_step", lambda run, lr: torch.empty(2**60))
    (tmp_path / "run.yml").write_text(yaml.safe_dump(mapping(tmp_path)))
    assert main([str(tmp_path / "run.yml")]) == 6
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "lower training.micro_batch (now 4)" in err and "recompute to full" in err, err


def test_what_memory_that_is_out_looks_like() -> None:
    for action in (lambda: torch.empty(2**60), lambda: np.empty(2**50), lambda: bytearray(2**62)):
        with pytest.raises((RuntimeError, MemoryError)) as told:
            action()
        assert is_out_of_memory(told.value)
    wrapped = RuntimeError("a stage failed")
    wrapped.__cause__ = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    assert is_out_of_memory(wrapped) and not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_run_in_a_thread(tmp_path: Path) -> None:
    (tmp_path / "run.yml").write_text(yaml.safe_dump(mapping(tmp_path, training={"budget": 2})))
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main([str(tmp_path / "run.yml")])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_tools_without_their_packages_use_the_environment_beside_them(tmp_path: Path) -> None:
    """A checkout, a Python without packages, and a .venv that has them or isn't there."""
    checkout = tmp_path / "checkout"
    (checkout / "tools").mkdir(parents=True)
    for name in ("launch.sh", "tools/report.py", "tools/find_megarewarm.py", "tools/environment.sh"):
        shutil.copy(ROOT / name, checkout / name)
    for name in ("megarewarm", "kernels", "pyproject.toml", "constraints.txt", "tests"):
        (checkout / name).symlink_to(ROOT / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    bare = {"PATH": f"{tmp_path / 'bare' / 'bin'}:/usr/bin:/bin", "PYTHONPATH": ""}
    for key in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        bare[key] = ""
    python = str(tmp_path / "bare" / "bin" / "python")
    done = ended([python, str(checkout / "tools" / "report.py"), "runs/x"], env=bare)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"environment.sh" in done.stderr, done.stderr
    for words in ([], ["--help"], ["run.yml", "-h"], ["--version"]):  # installs nothing
        done = ended(["bash", str(checkout / "launch.sh"), *words], env=bare)
        assert done.returncode == 0 and done.stdout and done.stderr == b"", done.stderr
        assert not (checkout / ".venv").exists()
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (checkout / ".venv" / "bin" / "python").chmod(0o755)
    done = ended([python, str(checkout / "tools" / "report.py"), "--help"], env=bare)
    assert done.returncode == 0 and done.stdout.startswith(b"usage:")


@pytest.mark.parametrize("words", [["--dryrun"], ["--dry_run"], ["--quik"]])
def test_a_mistyped_option(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as told:
        main(["run.yml", *words])
    assert told.value.code == 2 and "did you mean '--" in capsys.readouterr().err


def test_the_names_of_types_are_those_that_are_written() -> None:
    assert tuple(convert.DTYPES) == DTYPES and tuple(convert.FORMS) == FORMS


SOURCES = [path for folder in ("megarewarm", "tools", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_has_an_encoding_and_consoles_have_one_maker(path: Path) -> None:
    """What the locale would decide: files read and written as text, what other programs print, and the console."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        owner = getattr(getattr(node.func, "value", None), "id", None)
        keys = {keyword.arg for keyword in node.keywords}
        where = f"{path}:{node.lineno}"
        if name in ("read_text", "write_text"):
            assert "encoding" in keys, where
        if name == "open" and isinstance(node.func, ast.Name):
            modes = [a.value for a in [*node.args[1:], *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)]
            assert "encoding" in keys or any("b" in str(mode) for mode in modes), where
        if owner == "subprocess":
            assert "text" not in keys, where
        if name == "Console" and path.name != "console.py":
            raise AssertionError(f"{where}: megarewarm.console.make_console")


def test_recorded_reports_are_json(place: Path, tmp_path: Path) -> None:
    done = ended(commands(place, tmp_path)["replay_batch"])
    assert done.returncode == 0 and json.loads((tmp_path / "batch.json").read_text())
