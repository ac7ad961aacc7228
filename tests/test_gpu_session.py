"""benchmarks/gpu_session.py with stand-in calls: what is over stays over, what was cut is begun again, the rest goes on."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("gpu_session", ROOT / "benchmarks/gpu_session.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_session", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "MARGIN", 0.0)
    monkeypatch.setattr(module, "LEAST", 0.2)
    monkeypatch.setattr(module, "write_summary", lambda folder: None)
    return module


def shell(text: str) -> tuple[str, ...]:
    return ("bash", "-c", text)


def test_a_session_goes_on_where_it_was_cut_off(session: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    count = f"echo x >> {tmp_path}/"
    # the child of a call that is cut would hold this file open, and write to it later
    waits = f"{count}waits; [ -e {tmp_path}/ready ] || {{ (sleep 1.4; {count}late) & wait; }}; echo '[1]' > {{result}}"
    every = [
        session.Call("right", shell(f"{count}right; test -d {{scratch}} && echo fine"), 30.0),
        session.Call("wrong", shell(f"{count}wrong; echo oh; exit 3"), 30.0),
        session.Call("hangs", shell(f"{count}hangs; sleep 30"), 1.0),
        session.Call("waits", shell(waits), 30.0),
        session.Call("last", shell(f"{count}last"), 30.0),
    ]

    def begun() -> dict[str, int]:
        return {call.name: (tmp_path / call.name).read_text().count("x") for call in every if (tmp_path / call.name).exists()}

    def states() -> dict[str, str]:
        return {call.name: session.read_state(out, call).get("state", "") for call in every}

    assert session.run_session(every[:3], out, 60.0) == 1
    assert session.run_session(every, out, 1.0) == session.GO_ON
    assert states() == {"right": "done", "wrong": "failed", "hangs": "hung", "waits": "cut", "last": ""}
    assert session.read_state(out, every[1])["code"] == 3 and session.read_state(out, every[1])["last"] == "oh"
    assert session.read_state(out, every[0])["last"] == "fine" and not list(out.glob("*.part"))
    assert session.run_session(every, out, 0.1) == session.GO_ON and begun()["waits"] == 1, "too little is left for it"
    (tmp_path / "ready").touch()
    assert session.run_session(every, out, 60.0) == 1, "two have failed"
    assert begun() == {"right": 1, "wrong": 1, "hangs": 1, "waits": 2, "last": 1}
    assert (out / "waits.result.json").read_text() == "[1]\n" and states()["last"] == "done"
    assert session.run_session(every, out, 60.0, again=["wrong"]) == 1 and begun()["wrong"] == 2 and begun()["last"] == 1
    time.sleep(0.6)
    assert not (tmp_path / "late").exists(), "a call's children end with it"


@pytest.mark.parametrize("smoke", [False, True])
def test_the_calls_are_what_their_programs_take(session: Any, smoke: bool) -> None:
    every = session.calls(smoke)
    assert len({call.name for call in every}) == len(every)
    for call in every:
        files = [word for word in call.command if word.endswith(".py")]
        assert files and all((ROOT / file).is_file() for file in files), call
        assert 20 <= call.limit <= 400
    named = {word for call in every for word in call.command if word.startswith("tests/")}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*_gpu.py")} == named, "every test of a GPU"


def test_the_summary_of_what_is_there(tmp_path: Path) -> None:
    state = {"state": "done", "seconds": 2.0, "last": "x | y", "at": "2026-01-01"}
    step = {"times": [0.1, 0.2, 0.1], "losses": [9.0, 8.0], "memory": 3.5, "what": "", "shares": {"GEMM": 60.0, "ours": 20.5}}
    for name, result in {
        "step_triton_1": {"megarewarm, triton": [step]},
        "step_triton_2": {"megarewarm, triton": [{**step, "times": [0.1], "shares": {}}]},
        "step_triton_batch_2": {"megarewarm, triton": [{**step, "times": [0.05]}]},
        "kernels": {"rows": [{"operation": "norms", "side": "ours", "share": 0.5}]},
        "curves": None,
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(state))
        if result is not None:
            (tmp_path / f"{name}.result.json").write_text(json.dumps(result))
    (tmp_path / "kernels.txt").write_text("| a table |")
    (tmp_path / "curves.txt").write_text("first\nsecond\nthird\n")
    subprocess.run([sys.executable, ROOT / "benchmarks/gpu_summary.py", tmp_path, "--picture"], check=True)
    page = (tmp_path / "summary.md").read_text()
    assert (
        "| megarewarm, triton | 100.00 | 163,840 | 3.50 | 8.0000 |" in page and "| megarewarm, triton | 60.00 | 20.50 |" in page
    )
    assert "2: 81,920, 3.5; 8: 163,840, 3.5" in page and "| a table |" in page and "| kernels | done | 2 | x / y |" in page
    assert page.endswith("## curves\n\nsecond\nthird\n")
    assert (tmp_path / "summary.png").stat().st_size > 10_000
