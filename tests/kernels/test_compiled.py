"""Every shipped kernel configuration compiles for real GPUs without spills and with 128-bit accesses, as the page says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
NARROW = {"adamw many tensors, anywhere", "squared norm of many tensors, anywhere", "rotary bf16 d 80 r 20"}
"""Kernels whose values begin anywhere, so that no access can be wide."""


@pytest.mark.parametrize("words", [[], pytest.param(["--all"], marks=pytest.mark.slow)], ids=["usual", "all"])
def test_shipped_configurations_compile_without_spills(tmp_path: Path, words: list[str]) -> None:
    environment = os.environ | {"TRITON_DEFAULT_FP_FUSION": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, str(ROOT / "tests" / "kernel_compile.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["architecture"] for row in rows} == ({80, 90, 100} if words else {80, 90})
    assert len({row["name"] for row in rows}) >= (190 if words else 11)
    for row in rows:
        assert row["spills"] == row["stack"] == 0, row
        assert row["wide"] or row["name"] in NARROW, row
        if row["name"].startswith("attention"):
            assert bool(row["tensor_core"]) == ("bf16" in row["name"]), row  # fp32 is exact
        assert row["shared"] <= (99 if row["architecture"] == 80 else 227) * 1024 and row["registers"] <= 255, row
    page = (ROOT / "docs" / "kernels.md").read_text()
    assert all(f"| {row['name']} |" in page for row in rows), "write the page again: python tests/kernel_compile.py --write"
