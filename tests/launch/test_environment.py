"""What each launcher leaves in the environment, as recorded from real ones, and the launch script as two languages."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megarewarm.errors import UserError
from megarewarm.parallel.launchers import Launch, hosts, read_launcher

ROOT = Path(__file__).resolve().parents[2]

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "0",
    "CROSS_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "123456",
}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (TORCHRUN, Launch(5, 8, 1, 4, "node0", 29400, "torchrun")),
        (DEEPSPEED, Launch(1, 2, 1, 2, "127.0.0.1", 29500, "deepspeed")),
        (OPENMPI, Launch(3, 4, 3, 4, "127.0.0.1", 29500, "openmpi")),
        (MPICH, Launch(1, 2, 1, 2, "127.0.0.1", 29500, "mpich")),
        (SLURM, Launch(9, 16, 1, 1, "gpu07", 29500 + 3456, "slurm")),
        ({}, Launch(0, 1, 0, 1, "127.0.0.1", 29500, "none")),
        # one task of an allocation: sbatch runs the script itself with SLURM_PROCID=0
        ({"SLURM_PROCID": "0", "SLURM_JOB_ID": "5", "SLURM_NTASKS": "8"}, Launch(0, 1, 0, 1, "127.0.0.1", 29500, "none")),
        # PMI-2 of Slurm names no local ranks, Slurm does
        (SLURM | {"PMI_RANK": "9", "PMI_SIZE": "16"}, Launch(9, 16, 1, 1, "gpu07", 29500 + 3456, "slurm")),
        # a script that each of two tasks runs, and that starts four ranks
        (
            SLURM
            | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
            | {"LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu07"},
            Launch(5, 8, 1, 4, "gpu07", 29500, "environment"),
        ),
        (
            SLURM | {"SLURM_DISTRIBUTION": "arbitrary", "SLURM_ARBITRARY_NODELIST": "gpu08,gpu07"},
            Launch(9, 16, 1, 1, "gpu08", 29500 + 3456, "slurm"),
        ),
        # torchrun inside a Slurm step: the nearer launcher counts
        (SLURM | TORCHRUN, Launch(5, 8, 1, 4, "node0", 29400, "torchrun")),
    ],
    ids=[
        "torchrun",
        "deepspeed",
        "openmpi",
        "mpich",
        "slurm",
        "none",
        "sbatch",
        "pmi2",
        "own starter",
        "by hand",
        "torchrun in slurm",
    ],
)
def test_each_launcher_is_understood(environ: dict[str, str], expected: Launch) -> None:
    assert read_launcher(environ) == expected


def test_deepspeeds_argument_stands_in_for_a_missing_local_rank() -> None:
    environ = {key: value for key, value in DEEPSPEED.items() if key != "LOCAL_RANK"}
    assert read_launcher(environ, argv_local_rank=1).local_rank == 1


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (TORCHRUN | {"RANK": "x"}, "RANK is 'x', expected a whole number"),
        (TORCHRUN | {"RANK": "8"}, "8"),
        (
            SLURM | {"RANK": "0", "WORLD_SIZE": "16"},
            "WORLD_SIZE=16 contradict SLURM_PROCID=9",
        ),
        (SLURM | {"RANK": "0", "WORLD_SIZE": "1"}, "contradict SLURM_PROCID=9"),
        (OPENMPI | {"RANK": "0", "WORLD_SIZE": "4"}, "contradict OMPI_COMM_WORLD_RANK=3"),
        (MPICH | {"RANK": "0", "WORLD_SIZE": "2"}, "contradict PMI_RANK=1"),
        ({"RANK": "3"}, "RANK is set to 3 and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set to 2 and RANK is not"),
        ({"RANK": "3", "WORLD_SIZE": "1"}, "rank 3 does not lie in a world of 1"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK=4, LOCAL_WORLD_SIZE=4"),
        (SLURM | {"SLURM_DISTRIBUTION": "arbitrary"}, "export MASTER_ADDR"),
        (OPENMPI | {"OMPI_COMM_WORLD_SIZE": "many"}, "OMPI_COMM_WORLD_SIZE is 'many'"),
    ],
)
def test_contradictions_are_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_launcher(environ)


@pytest.mark.parametrize(
    ("nodelist", "names"),
    [
        ("node1", ["node1"]),
        ("a,b", ["a", "b"]),
        ("gpu[07-10]", ["gpu07", "gpu08", "gpu09", "gpu10"]),
        ("a[01-02,7],b", ["a01", "a02", "a7", "b"]),
        ("rack[1-2]-ib,login", ["rack1-ib", "rack2-ib", "login"]),
    ],
)
def test_slurms_compact_host_lists(nodelist: str, names: list[str]) -> None:
    assert hosts(nodelist) == names


def test_the_launch_script_is_bash_and_python() -> None:
    script = ROOT / "launch.sh"
    compile(script.read_text(), "launch.sh", "exec")
    subprocess.run(["bash", "-n", str(script)], check=True)
    subprocess.run(["sh", "-n", str(ROOT / "tools" / "environment.sh")], check=True)
