"""The launcher of this process, and its rank, world size and master, from the environment."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from megarewarm.errors import UserError

DEFAULT_PORT = 29500
LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")


@dataclass(frozen=True)
class Launch:
    """Place of this process in the job. ``launcher`` is its name; 'none' is a single process. ``began``: when this was read,
    at the start of the process, by ``time.monotonic``."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    launcher: str
    began: float = field(default_factory=time.monotonic, compare=False)


def read_launcher(environ: Mapping[str, str], argv_local_rank: int | None = None) -> Launch:
    """The launch described by ``environ``: torchrun, deepspeed, Open MPI, MPICH / Intel MPI, Slurm, or none.

    ``argv_local_rank`` is the ``--local_rank`` that the DeepSpeed launcher adds. Variables that torchrun and deepspeed set
    win over those of an MPI or Slurm job around them. Raises ``UserError`` for variables that contradict each other.
    """
    _refuse_half(environ)
    if "RANK" in environ and "WORLD_SIZE" in environ:
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "deepspeed" if "CROSS_SIZE" in environ else "environment"
        local_default = argv_local_rank if argv_local_rank is not None else _number(environ, "RANK")
        local_rank = _number(environ, "LOCAL_RANK", local_default)
        world = _number(environ, "WORLD_SIZE")
        if launcher == "environment":
            _refuse_stale(environ, _number(environ, "RANK"), world)
        # a launcher that names no local size has put all ranks on this host if the master is this host
        unnamed = world if environ.get("MASTER_ADDR", "localhost") in LOOPBACK else 1
        local_size = _number(environ, "LOCAL_WORLD_SIZE", _number(environ, "LOCAL_SIZE", unnamed))
        return _launch(environ, launcher, _number(environ, "RANK"), world, local_rank, local_size)
    if "OMPI_COMM_WORLD_RANK" in environ:
        return _mpi(
            environ,
            "openmpi",
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
        )
    # srun --mpi=pmi2 and cray_shasta set these as well, and Slurm has more information: the host of each task
    pmi_of_slurm = environ.get("PMI_SIZE") == environ.get("SLURM_STEP_NUM_TASKS") and "MPI_LOCALNRANKS" not in environ
    if "PMI_RANK" in environ and "PMI_SIZE" in environ and not pmi_of_slurm:
        return _mpi(environ, "mpich", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    if "SLURM_PROCID" in environ and _number(environ, "SLURM_STEP_NUM_TASKS", 1) > 1:
        nodes = hosts(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "localhost")
        world = _number(environ, "SLURM_STEP_NUM_TASKS")
        return _launch(
            environ,
            "slurm",
            _number(environ, "SLURM_PROCID"),
            world,
            _number(environ, "SLURM_LOCALID", 0),
            world if len(nodes) == 1 else 1,
            _slurm_master(environ, nodes),
            DEFAULT_PORT + _number(environ, "SLURM_JOB_ID", 0) % 10_000,
        )
    return Launch(0, 1, 0, 1, "127.0.0.1", _number(environ, "MASTER_PORT", DEFAULT_PORT), "none")


def _refuse_half(environ: Mapping[str, str]) -> None:
    """Refuse RANK without WORLD_SIZE, or the reverse, with which every process would start its own run."""
    for one, other, harmless in (("RANK", "WORLD_SIZE", "0"), ("WORLD_SIZE", "RANK", "1")):
        if one in environ and other not in environ and environ[one] != harmless:
            raise UserError(f"{one} is set to {environ[one]} and {other} is not: set both, or unset {one}")


def _refuse_stale(environ: Mapping[str, str], rank: int, world: int) -> None:
    """Refuse RANK and WORLD_SIZE that contradict the launcher: they were exported before it started this process."""
    places = (
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
    )
    for rank_key, size_key in places:
        if rank_key not in environ or size_key not in environ:
            continue
        tasks = _number(environ, size_key)
        # ranks that each task starts itself are a multiple of the tasks, in their order
        share = world // tasks if tasks > 0 else 0
        if tasks > 1 and (not share or share * tasks != world or rank // share != _number(environ, rank_key)):
            raise UserError(
                f"RANK={rank} and WORLD_SIZE={world} contradict {rank_key}={environ[rank_key]} and {size_key}={tasks}: they "
                f"were exported before the launcher started this process; unset RANK, WORLD_SIZE and LOCAL_RANK"
            )


def _slurm_master(environ: Mapping[str, str], nodes: list[str]) -> str:
    """The host of rank 0, the first of Slurm's list unless the tasks were placed by hand."""
    if len(nodes) > 1 and environ.get("SLURM_DISTRIBUTION") == "arbitrary" and not environ.get("MASTER_ADDR"):
        ordered = hosts(environ.get("SLURM_ARBITRARY_NODELIST", ""))
        if not ordered:
            raise UserError("srun placed the tasks by a list of hosts, so task 0's host is unknown: export MASTER_ADDR=HOST")
        return ordered[0]
    return nodes[0]


def hosts(nodelist: str) -> list[str]:
    """The host names in Slurm's compact form: ``a[01-03,7],b`` is a01, a02, a03, a7, b."""
    names = []
    for item in re.findall(r"[^,\[\]]+(?:\[[^\]]*\])?[^,\[\]]*", nodelist):
        match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", item)
        if match is None:
            names.append(item)
            continue
        for part in match[2].split(","):
            first, _, last = part.partition("-")
            names += [f"{match[1]}{n:0{len(first)}d}{match[3]}" for n in range(int(first), int(last or first) + 1)]
    return names


def _number(environ: Mapping[str, str], key: str, default: int | None = None) -> int:
    text = environ.get(key)
    if text is None:
        if default is None:
            raise UserError(f"the launcher set no {key}; start megarewarm with deepspeed, torchrun, mpirun or srun")
        return default
    try:
        return int(text)
    except ValueError:
        raise UserError(f"the environment variable {key} is '{text}', expected a whole number") from None


def _mpi(environ: Mapping[str, str], launcher: str, rank: str, size: str, local_rank: str, local_size: str) -> Launch:
    world = _number(environ, size)
    local = _number(environ, local_size, world)
    addr = environ.get("MASTER_ADDR")
    if addr is None and local < world:
        addr = _mpi_master()
    return _launch(
        environ, launcher, _number(environ, rank), world, _number(environ, local_rank, _number(environ, rank)), local, addr
    )


def _mpi_master() -> str:
    """The main rank's host name, from MPI itself."""
    import socket

    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(f"mpirun over several hosts needs mpi4py to find the main rank ({error}); or set MASTER_ADDR") from None
    return str(MPI.COMM_WORLD.bcast(socket.gethostname(), root=0))


def _launch(
    environ: Mapping[str, str],
    launcher: str,
    rank: int,
    world_size: int,
    local_rank: int,
    local_world_size: int,
    master_addr: str | None = None,
    master_port: int = DEFAULT_PORT,
) -> Launch:
    if not 0 <= rank < world_size:
        raise UserError(f"launcher {launcher}: rank {rank} does not lie in a world of {world_size}")
    if not local_rank >= 0:
        raise UserError(f"launcher {launcher}: local rank {local_rank} is below 0")
    named = {"LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= environ.keys() and launcher in ("torchrun", "environment")
    if named and (local_rank >= local_world_size or local_world_size > world_size):
        raise UserError(
            f"LOCAL_RANK={local_rank}, LOCAL_WORLD_SIZE={local_world_size} and WORLD_SIZE={world_size} contradict each other: "
            f"unset those that were exported before the launcher started this process"
        )
    addr = (environ.get("MASTER_ADDR") or master_addr or "127.0.0.1").removeprefix("[").removesuffix("]")
    port = _number(environ, "MASTER_PORT", master_port)
    return Launch(rank, world_size, local_rank, local_world_size, addr, port, launcher)
