"""torchrun itself: a rank killed while it saves is started again, and the run ends as the one that nobody touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.chaos.ledger import difference
from tests.support.tiny import events, mapping

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = Path(sys.executable).parent / "torchrun"
pytestmark = [pytest.mark.launch, pytest.mark.skipif(not TORCHRUN.exists(), reason="torchrun is not installed")]


def start(path: Path, restarts: int) -> subprocess.Popen[str]:
    words = [str(TORCHRUN), "--nproc-per-node", "2", "--max-restarts", str(restarts), "launch.sh", str(path)]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_a_rank_killed_in_a_save_under_torchrun_changes_nothing(tmp_path: Path) -> None:
    settings = {"training": {"budget": 40}, "evaluation": {"every": 10}, "checkpoint": {"every": 2, "keep_last": 3}}
    run, path = tmp_path / "run", tmp_path / "run.yml"
    path.write_text(yaml.safe_dump(mapping(tmp_path, folder=str(run), **settings)))
    output, _ = (process := start(path, 0)).communicate(timeout=300)
    assert process.returncode == 0, output
    undisturbed = run.rename(tmp_path / "undisturbed")

    process = start(path, 2)
    deadline = time.monotonic() + 300
    while not ((run / "checkpoints" / "step_10").is_dir() and any((run / "checkpoints").glob("step_*.partial"))):
        assert time.monotonic() < deadline and process.poll() is None, "no save was seen"
        time.sleep(0.002)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(found.stdout.split()[0]), signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert [line["step"] >= 10 for line in events(run, "resume")] == [True]
    assert difference(run, undisturbed) is None
