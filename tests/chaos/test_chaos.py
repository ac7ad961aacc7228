"""One fault of each kind, against runs of two ranks; many of each: ``bash tests/run --chaos``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.faults import supported

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.launch


@pytest.mark.slow
def test_one_fault_of_each_kind_costs_no_step(tmp_path: Path) -> None:
    """In a process of its own: this one has threads, and must not fork."""
    paths = [str(ROOT), str(ROOT / "kernels")]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    options = ["--layouts", "replicated,zero2,tensor", "--timeout", "0.1", "--seed", "7", "--json", str(tmp_path / "outcomes")]
    result = subprocess.run(
        [sys.executable, "-m", "tests.chaos.campaign", "--each", *options, "--folder", str(tmp_path / "runs")],
        env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    answer = json.loads((tmp_path / "outcomes").read_text())
    happened = {outcome["fault"]["kind"] for outcome in answer["outcomes"]}
    assert happened >= set(supported()) - {"disk_full"}, "disk_full alone needs what not everybody may do: mounting"
    assert not answer["unprovoked"] and not any(outcome["lost"] or outcome["failure"] for outcome in answer["outcomes"])
    stops = {outcome["fault"]["kind"]: outcome["named"] for outcome in answer["outcomes"]}
    assert stops["truncated"] and stops["refused"] and stops["reads_fail"]
