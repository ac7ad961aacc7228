"""All that is to be run on a first GPU, call after call inside a time limit; called again it goes on where it was cut off.

    python benchmarks/gpu_session.py --folder OUT [--limit 540] [--earlier DIR] [--wheels DIR]
    python benchmarks/gpu_session.py --folder OUT --list                   (the calls and what became of them)
    python benchmarks/gpu_session.py --folder OUT --smoke                  (everything small, also on a CPU)

GPU tests of every operation, of the model and of the trainer; kernels.py; kernel_tables.py; each side of train_step.py with its
profile; other batches; kernel_curves.py. Of each call CALL, OUT has CALL.txt (what it printed), CALL.result.json (its own
results, where it writes some; also of a call that was cut) and CALL.json: state, seconds, exit code. States: done; failed
(another exit code); hung (longer than its own limit); cut (by --limit: begun again next time). Failed and hung calls are not
repeated unless --again names them. OUT/summary.md is written after each call, OUT/summary.png, with matplotlib, at the end.

Where every command starts with an empty folder, as on a machine that is lent by the command, --earlier copies another session's
results first. --wheels installs carried wheels into a temporary folder with pip, without an index; nothing else is installed.
Exit code 0: all were run; 1: some of them failed or hung; 75: time was up, call it again.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARGIN, LEAST = 10.0, 20.0
"""Seconds that are kept for the end and its picture, and seconds without which no call is begun."""
GO_ON = 75
TESTS = {
    "tests_operations": ("tests/kernels/test_operations_gpu.py", "tests/kernels/test_gelu_products_gpu.py"),
    "tests_attention_loss": ("tests/kernels/test_attention_gpu.py", "tests/kernels/test_loss_gpu.py"),
    "tests_model": ("tests/model/test_fused_gpu.py",),
    "tests_trainer": ("tests/training/test_run_gpu.py", "tests/parallel/test_graph_gpu.py"),
}
SIDES = {
    "step_triton": "megarewarm, triton",
    "step_graph": "megarewarm, triton and graph",
    "step_cublaslt": "megarewarm, triton and GELU by cuBLASLt",
    "step_compile": "megarewarm, compile",
    "step_compile_triton": "megarewarm, compile and triton",
    "step_reference": "megarewarm, reference",
    "step_transformers": "transformers, sdpa",
    "step_transformers_compiled": "transformers, sdpa, compiled",
}
BATCHES = (1, 2, 4, 16, 32)  # train_step.py's own is 8


@dataclass(frozen=True)
class Call:
    """``{result}`` in a command is OUT/NAME.result.json, ``{out}`` OUT, ``{scratch}`` a folder that is not kept."""

    name: str
    command: tuple[str, ...]
    limit: float


def calls(smoke: bool) -> list[Call]:
    """In the order of their worth: what is right before what is fast."""
    small = ("--smoke",) if smoke else ()

    def script(name: str, *words: str) -> tuple[str, ...]:
        return (sys.executable, f"benchmarks/{name}.py", *words, *small)

    workers = ("-n", str(max(1, min(6, (os.cpu_count() or 1) // 2)))) if importlib.util.find_spec("xdist") else ()
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *workers)
    found = [Call(name, (*pytest, "--junitxml", "{out}/" + name + ".xml", *files), 300) for name, files in TESTS.items()]
    found += [
        Call("step_smoke", (sys.executable, "benchmarks/train_step.py", "--smoke", "--limit", "60", "--json", "{result}"), 240),
        Call("step_triton_1", (*step("step_triton", small), "--profile"), 150),
        Call("step_compile_1", (*step("step_compile", small), "--profile"), 300),
        Call(
            "kernels",
            script("kernels", "--seconds", "0.4", "--json", "{result}", "--picture", "{out}/kernels.png"),
            300,
        ),
    ]
    found += [
        Call(f"table_{name}", script("kernel_tables", name, "--json", "{result}"), 150)
        for name in ("products", "attention", "loss")
    ]
    rest = [side for side in SIDES if side not in ("step_triton", "step_compile")]
    found += [Call(f"{side}_1", (*step(side, small), "--profile"), 300) for side in rest]
    found += [
        Call(f"{side}_batch_{batch}", (*step(side, small), "--batch", str(batch)), 150)
        for batch in BATCHES
        for side in ("step_triton", "step_compile", *(["step_graph"] if batch <= 2 else []))
    ]
    curves = script("kernel_curves", "--folder", "{scratch}/curves", "--steps", "10" if smoke else "200")
    found.append(Call("curves", (*curves, "--picture", "{out}/kernel_curves.png"), 400))
    found += [Call(f"{side}_2", step(side, small), 300) for side in SIDES]
    return found


def step(side: str, small: tuple[str, ...]) -> tuple[str, ...]:
    """One side of train_step.py, once."""
    steps = () if small else ("--steps", "15", "--warmup", "6", "--limit", "290")
    words = ("--rounds", "1", "--sides", SIDES[side], "--json", "{result}", *steps, *small)
    return (sys.executable, "benchmarks/train_step.py", *words)


def read_state(folder: Path, call: Call) -> dict[str, Any]:
    """What became of a call; empty where it was not begun."""
    path = folder / f"{call.name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def is_over(state: dict[str, Any], again: bool) -> bool:
    """Whether a call is not begun again."""
    return state.get("state") == "done" or (state.get("state") in ("failed", "hung") and not again)


def run_session(
    every: Sequence[Call], folder: Path, limit: float, again: Sequence[str] = (), environment: dict[str, str] | None = None
) -> int:
    """Run what is left of ``every``; the exit code of the session."""
    end, begun = time.monotonic() + limit - MARGIN, False
    for call in every:
        if is_over(read_state(folder, call), call.name in again):
            continue
        left = end - time.monotonic()
        if left < min(LEAST, call.limit) or (begun and left < call.limit / 3):  # which would mostly be wasted
            print(f"{call.name}: not begun, {max(0.0, left):.0f} s are left: call this again to go on", flush=True)
            return GO_ON
        begun = True
        state = run_call(call, folder, min(left, call.limit), environment)
        replace(folder / f"{call.name}.json", json.dumps(state, indent=1) + "\n")
        print(f"{call.name}: {state['state']}, {state['seconds']:.0f} s; {state['last']}", flush=True)
        write_summary(folder)
        if state["state"] == "cut":
            return GO_ON
    states = [read_state(folder, call)["state"] for call in every]
    return 1 if {"failed", "hung"} & set(states) else 0


def run_call(call: Call, folder: Path, seconds: float, environment: dict[str, str] | None) -> dict[str, Any]:
    """Run one call for at most ``seconds``; its whole process group ends with it."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, (folder / f"{call.name}.txt").open("w") as output:
        names = {"{result}": str(folder / f"{call.name}.result.json"), "{out}": str(folder), "{scratch}": scratch}
        command = list(call.command)
        for name, value in names.items():
            command = [word.replace(name, value) for word in command]
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_group(process)
    kind = ("hung" if seconds >= call.limit else "cut") if code is None else "failed" if code else "done"
    lines = (folder / f"{call.name}.txt").read_text(errors="replace").strip().splitlines()
    return {
        "state": kind,
        "seconds": time.monotonic() - began,
        "code": code,
        "limit": seconds,
        "last": lines[-1][:200] if lines else "",
        "command": command,
        "at": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Whatever is left of a call, its children too."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text)
    part.replace(path)


def write_summary(folder: Path, picture: bool = False) -> None:
    """In a process of its own: a fault of it, or a plain machine without matplotlib, ends no session."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_summary.py")), str(folder)]
    try:
        done = subprocess.run([*command, *["--picture"] * picture], capture_output=True, text=True, timeout=MARGIN + 30)
    except subprocess.TimeoutExpired:
        print(f"summary: not done after {MARGIN + 30:.0f} s", flush=True)
        return
    if done.returncode:
        print(f"summary: failed: {done.stderr.strip().splitlines()[-1]}", flush=True)


def install(wheels: Path) -> Path:
    """A temporary folder with the wheels of a folder; pip asks no index."""
    site = Path(tempfile.mkdtemp(prefix="megarewarm_site_"))
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    if not files:
        sys.exit(f"--wheels {wheels}: no .whl in it")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
    subprocess.run([*pip, "--upgrade", "--target", str(site), *files], check=True)
    return site


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="results; new or of an earlier session")
    parser.add_argument("--earlier", type=Path, help="another session's results, copied into --folder first")
    parser.add_argument("--limit", type=float, default=540.0, metavar="S", help="seconds in all; default: %(default)s")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="carried wheels, installed for this session")
    parser.add_argument("--only", nargs="+", metavar="CALL", help="these calls, in their order")
    parser.add_argument(
        "--again", nargs="+", metavar="CALL", default=[], help="calls that failed or hung and are to be repeated"
    )
    parser.add_argument("--list", action="store_true", help="show the calls and their states, and end")
    parser.add_argument(
        "--smoke", action="store_true", help="everything small, also on a CPU: shows that it works, not how fast"
    )
    arguments = parser.parse_args()
    began = time.monotonic()
    every = calls(arguments.smoke)
    if unknown := {*(arguments.only or ()), *arguments.again} - {call.name for call in every}:
        parser.error(f"no call {', '.join(sorted(unknown))}; --list shows them")
    chosen = [call for call in every if arguments.only is None or call.name in arguments.only]
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.earlier is not None:
        if not arguments.earlier.is_dir():
            parser.error(f"--earlier {arguments.earlier}: no such folder")
        shutil.copytree(arguments.earlier, folder, dirs_exist_ok=True)
    if arguments.list:
        for call in chosen:
            state = read_state(folder, call)
            print(f"{call.name}: {state.get('state', 'not begun')}, at most {call.limit:.0f} s: {' '.join(call.command)}")
        return
    paths = [str(install(arguments.wheels))] if arguments.wheels else []
    paths += [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
    }
    limit = arguments.limit - (time.monotonic() - began)
    code = run_session(chosen, folder, limit, arguments.again, environment)
    write_summary(folder, picture=True)
    print(
        {0: "all done", 1: "all run, some failed or hung", GO_ON: "time is up: call it again"}[code] + f"; {folder}/summary.md"
    )
    sys.exit(code)


if __name__ == "__main__":
    main()
