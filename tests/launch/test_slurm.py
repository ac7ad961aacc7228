"""The sbatch scripts under a real Slurm: submit, watch, signal, requeue, resume, cancel, sweep."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.slurm_cluster import Cluster
from tests.support.tiny import events, mapping
from tests.training.test_resume import wait_for_step

ROOT = Path(__file__).resolve().parents[2]
TRAIN, ARRAY = str(ROOT / "tools/slurm/train.sbatch"), str(ROOT / "tools/slurm/array.sbatch")
pytestmark = pytest.mark.launch
# enough that a job is still running when a signal reaches it, however busy the machine is
STEPS = 200


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    cluster.start()
    cluster.environ |= {"MEGAREWARM_ROOT": str(ROOT), "VIRTUAL_ENV": sys.prefix}
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the run in one process, started by hand."""
    place = tmp_path_factory.mktemp("alone")
    subprocess.run([sys.executable, "launch.sh", write_config(place, "alone")], cwd=ROOT, check=True, capture_output=True)
    return losses(place / "alone")


def write_config(place: Path, name: str, steps: int = STEPS) -> str:
    endless = {"train": [{"path": str(place / "new"), "max_epochs": None}]}
    changes = {"training": {"budget": steps}, "evaluation": {"every": 50}, "checkpoint": {"every": 20}, "data": endless}
    path = place / f"{name}.yml"
    path.write_text(yaml.safe_dump(mapping(place, name=name, folder=str(place / name), **changes)))
    return str(path)


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in events(folder, "train")}


def output_of(place: Path, job: str) -> str:
    return (place / f"megarewarm-{job}.out").read_text()


def wait_for_restart(cluster: Cluster, job: str, place: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while cluster.field(job, "Restarts") != "1":
        assert time.monotonic() < deadline, output_of(place, job)
        time.sleep(0.5)


@pytest.mark.parametrize(
    "shape",
    [pytest.param(["--nodes=1", "--ntasks-per-node=2"], marks=pytest.mark.slow), ["--nodes=2", "--ntasks-per-node=1"]],
    ids=str,
)
def test_ranks_on_one_node_and_on_two(cluster: Cluster, tmp_path: Path, alone: dict[int, float], shape: list[str]) -> None:
    job = cluster.submit(*shape, TRAIN, write_config(tmp_path, "run"), "parallel.tensor=2", cwd=tmp_path)
    state = cluster.wait(job, "COMPLETED", "FAILED")
    assert state == "COMPLETED", output_of(tmp_path, job)
    assert "2 x cpu" in output_of(tmp_path, job) and "(by slurm)" in output_of(tmp_path, job)
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-5)


def test_a_signalled_job_saves_requeues_and_resumes_by_itself(
    cluster: Cluster, tmp_path: Path, alone: dict[int, float]
) -> None:
    job = cluster.submit("--nodes=2", TRAIN, write_config(tmp_path, "run"), cwd=tmp_path)
    wait_for_step(tmp_path / "run" / "metrics.jsonl", 7)
    cluster.command("scancel", "--signal=USR1", job)
    wait_for_restart(cluster, job, tmp_path)
    cluster.wait(job, "COMPLETED", "FAILED")
    said = output_of(tmp_path, job)
    assert cluster.state(job) == "COMPLETED", said
    assert "it goes back into the queue" in said and "resumes at step" in said
    (stop, _), (resume,) = events(tmp_path / "run", "stop"), events(tmp_path / "run", "resume")
    assert stop["step"] == resume["step"] < STEPS
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
@pytest.mark.slow
def test_a_time_limit_is_only_an_interruption(cluster: Cluster, tmp_path: Path) -> None:
    """Slurm sends the signal by itself, ahead of the limit that the job was submitted with."""
    words = ["--time=1", "--signal=USR1@40", "--ntasks-per-node=2", TRAIN, write_config(tmp_path, "run", steps=100_000)]
    job = cluster.submit(*words, cwd=tmp_path)
    cluster.wait(job, "RUNNING")
    wait_for_restart(cluster, job, tmp_path, seconds=120)
    (stop,) = events(tmp_path / "run", "stop")
    assert stop["reason"] == "signal 10"
    cluster.wait(job, "RUNNING")
    wait_for_step(tmp_path / "run" / "metrics.jsonl", stop["step"] + 3)
    assert events(tmp_path / "run", "resume")[-1]["step"] == stop["step"]
    cluster.command("scancel", job)


@pytest.mark.slow
def test_a_job_whose_rank_is_killed_is_tried_again(cluster: Cluster, tmp_path: Path, alone: dict[int, float]) -> None:
    job = cluster.submit("--ntasks-per-node=2", TRAIN, write_config(tmp_path, "run"), cwd=tmp_path)
    wait_for_step(tmp_path / "run" / "metrics.jsonl", 21)
    deadline = time.monotonic() + 30
    while not (tmp_path / "run/checkpoints/step_20").is_dir() and time.monotonic() < deadline:
        time.sleep(0.02)  # it is written while training goes on
    cluster.command("scancel", "--signal=KILL", f"{job}.0")
    wait_for_restart(cluster, job, tmp_path)
    assert cluster.wait(job, "COMPLETED", "FAILED") == "COMPLETED", output_of(tmp_path, job)
    assert "the last checkpoint is whole; it goes back" in output_of(tmp_path, job)
    (resume,) = events(tmp_path / "run", "resume")
    assert resume["step"] >= 20
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_a_cancelled_job_saves_and_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit("--ntasks-per-node=2", TRAIN, write_config(tmp_path, "run", steps=3000), cwd=tmp_path)
    wait_for_step(tmp_path / "run" / "metrics.jsonl", 5)
    cluster.command("scancel", job)
    assert cluster.wait(job, "CANCELLED", "PENDING", "FAILED") == "CANCELLED"
    deadline = time.monotonic() + 30
    while not events(tmp_path / "run", "stop") and time.monotonic() < deadline:
        time.sleep(0.5)
    (stop,) = events(tmp_path / "run", "stop")
    assert (tmp_path / "run" / "checkpoints" / f"step_{stop['step']}").is_dir()


@pytest.mark.slow
def test_bad_input_is_not_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit("--ntasks-per-node=2", TRAIN, write_config(tmp_path, "run"), "parallel.tensor=3", cwd=tmp_path)
    assert cluster.wait(job, "COMPLETED", "FAILED", "PENDING") in ("FAILED", "PENDING")
    cluster.wait(job, "FAILED")
    assert cluster.field(job, "ExitCode") == "2:0" and cluster.field(job, "Restarts") == "0"
    assert output_of(tmp_path, job).count("start a multiple of 3") == 1


@pytest.mark.slow
def test_an_array_runs_one_variant_a_task(cluster: Cluster, tmp_path: Path) -> None:
    variants = tmp_path / "variants"
    variants.write_text(
        f"name=low folder={tmp_path}/low schedule.max_lr=1e-3\n\nname=high folder='{tmp_path}/high one' schedule.max_lr=3e-2\n"
    )
    words = ["--array=1-3", ARRAY, str(variants), write_config(tmp_path, "base", steps=5)]
    job = cluster.submit(*words, cwd=tmp_path)
    for task, state in ((1, "COMPLETED"), (2, "COMPLETED"), (3, "FAILED")):
        assert cluster.wait(f"{job}_{task}", "COMPLETED", "FAILED") == state
    assert max(line["lr"] for line in events(tmp_path / "low", "train")) == pytest.approx(1e-3)
    assert max(line["lr"] for line in events(tmp_path / "high one", "train")) == pytest.approx(3e-2)
    assert "expected overrides with a name" in (tmp_path / f"megarewarm-sweep-{job}_3.out").read_text()


@pytest.mark.slow
def test_a_sweep_runs_in_waves_each_after_what_it_starts_from(cluster: Cluster, tmp_path: Path) -> None:
    base = mapping(tmp_path)
    del base["name"], base["folder"]
    runs = [{"name": "up"}, {"name": "low", "schedule": {"max_lr": 1e-3}}, {"name": "next", "start": {"from": "${runs}/up"}}]
    whole = {"experiment": "e", "folder": str(tmp_path / "e"), "base": base, "runs": runs}
    (tmp_path / "e.yml").write_text(yaml.safe_dump(whole))
    command = [sys.executable, str(ROOT / "tools/sweep.py"), str(tmp_path / "e.yml"), "--launcher", "slurm", "--jobs", "2"]
    done = subprocess.run(command, cwd=tmp_path, env=cluster.environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith("job "))
    assert "afterok" in cluster.field(second, "Dependency") or cluster.state(second) != "PENDING"
    cluster.wait(second, "COMPLETED", seconds=180)
    for name in ("up", "low", "next"):
        assert events(tmp_path / "e" / name, "stop")[-1]["reason"] == "complete"
    assert events(tmp_path / "e" / "next", "start")[0]["time"] > events(tmp_path / "e" / "up", "stop")[-1]["time"]
    again = subprocess.run(
        [*command, "--dry-run"], cwd=tmp_path, env=cluster.environ, capture_output=True, text=True, check=True
    )
    assert "3 of 3 runs are done" in again.stdout
    assert first != second
