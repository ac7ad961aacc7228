"""Connecting the ranks: one process group, the device of each rank, and the words for when they don't meet."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import stat
import struct
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megarewarm.errors import EXIT_RANK_LOST, UserError
from megarewarm.file_lock import identity
from megarewarm.parallel.launchers import Launch
from megarewarm.parallel.ranks import Ranks

_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


def _shown() -> str:
    """What hides GPUs from this process, in words."""
    return "".join(f" ({key}={os.environ[key]})" for key in _VISIBLE if key in os.environ)


class RanksDidNotMeet(UserError):
    """A rank was never started, can't be reached, or died before all were there: another try may go well."""

    exit_code = EXIT_RANK_LOST


def connect(launch: Launch, device: str, timeout_minutes: float) -> Ranks:
    """The ranks of ``launch`` on ``device`` (auto, cpu or cuda): NCCL on GPUs, gloo on CPUs, nothing for one rank.

    Raises ``UserError`` when there is no such device, ``RanksDidNotMeet`` when the ranks don't meet in time.
    """
    chosen = choose_device(launch, device)
    if launch.world_size == 1:
        return Ranks(0, 1, chosen, began=launch.began)
    timeout = timedelta(minutes=timeout_minutes)
    if launch.local_world_size != launch.world_size and chosen.type == "cpu" and "GLOO_SOCKET_IFNAME" not in os.environ:
        # gloo would take the interface of the host's name, which on many hosts is the loopback
        name = interface_towards(launch.master_addr)
        if name is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = name
    try:
        store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", _store(launch, timeout))
        _wait_for_all(store, launch, timeout, "here")
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
        )
        # a rank that ends at once, on bad input, would close connections that others are still making
        _wait_for_all(store, launch, timeout, "connected")
        if launch.rank == 0 and launch.local_world_size == launch.world_size and launch.launcher != "torchrun":
            _meeting_point(launch).unlink(missing_ok=True)
    except (RuntimeError, dist.DistError, TimeoutError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RanksDidNotMeet(
            f"the {launch.world_size} ranks did not meet (rank {launch.rank} of launcher {launch.launcher}, on host "
            f"{socket.gethostname()}, master {launch.master_addr}:{launch.master_port}): {first}; check that every rank was "
            f"started and that the master's port is free and reachable"
        ) from error
    return Ranks(launch.rank, launch.world_size, chosen, launch.launcher, store, launch.began)


def _wait_for_all(store: dist.Store, launch: Launch, timeout: timedelta, what: str) -> None:
    """Return once every rank is so far. Raises ``TimeoutError`` naming those that are not."""
    store.set(f"{what}/{launch.rank}", socket.gethostname())
    if launch.rank != 0:
        store.wait([f"all_{what}"], timeout)
        return
    missing = list(range(launch.world_size))
    deadline = time.monotonic() + timeout.total_seconds()
    while missing := [rank for rank in missing if not store.check([f"{what}/{rank}"])]:
        if time.monotonic() > deadline:
            shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise TimeoutError(
                f"no word from rank{'s' * (len(missing) > 1)} {shown} in {timeout.total_seconds() / 60:g} minutes"
            )
        time.sleep(0.05)
    store.set(f"all_{what}", "yes")


def choose_device(launch: Launch, device: str) -> torch.device:
    """The device of this rank. Raises ``UserError`` where it isn't there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # Slurm's --gpus-per-task and --gpu-bind show each task its own GPU only, as number 0
    bound = {"SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND", "SLURM_NTASKS_PER_GPU", "SLURM_TRES_PER_TASK"} & os.environ.keys()
    # so does a script that exports CUDA_VISIBLE_DEVICES for each task
    named = any(len(os.environ.get(key, "").strip(",").split(",")) == 1 and os.environ.get(key) for key in _VISIBLE)
    own = count == 1 and (named or (launch.launcher == "slurm" and bool(bound)))
    number = 0 if own else launch.local_rank
    if number >= count:
        raise UserError(
            f"training.device: rank {launch.rank} needs GPU {number} of host {socket.gethostname()}, which has "
            f"{count}{_shown()}; start fewer ranks there or set it to cpu"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def _store(launch: Launch, timeout: timedelta) -> dist.Store:
    """The key-value store through which the ranks find each other.

    On one node the main rank lets the system choose a free port and tells the others through a private file, so two jobs
    on a machine can't collide on the launcher's default port. torchrun's agent holds a store of its own already.
    """
    main = launch.rank == 0
    if launch.launcher == "torchrun" or launch.local_world_size != launch.world_size:
        serves = main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        return dist.TCPStore(
            launch.master_addr, launch.master_port, launch.world_size, serves, timeout=timeout, wait_for_workers=False
        )
    meeting_point = _meeting_point(launch)
    if main:
        meeting_point.unlink(missing_ok=True)  # of an earlier run under the same launcher
        store = dist.TCPStore("127.0.0.1", 0, launch.world_size, True, timeout=timeout, wait_for_workers=False)
        partial = meeting_point.with_suffix(".partial")
        partial.write_text(str(store.port), encoding="utf-8")
        partial.rename(meeting_point)
        return store
    port = _wait_for_port(meeting_point, launch, timeout)
    return dist.TCPStore("127.0.0.1", port, launch.world_size, False, timeout=timeout, wait_for_workers=False)


def _meeting_point(launch: Launch) -> Path:
    """A file that all ranks of this job on this host agree on and no other job uses: named after the step of Slurm or the job
    of Open MPI, else after the process that launched them, which is their parent or that of scripts between."""
    job = _job_of(launch)
    folder = Path(tempfile.gettempdir()) / f"megarewarm-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UserError(f"{folder}: is no folder, or others may write in it; remove it or set TMPDIR to another folder")
    return folder / f"port-{job}-{launch.master_port}-{launch.world_size}"


def _job_of(launch: Launch) -> str:
    if launch.launcher == "slurm" and "SLURM_JOB_ID" in os.environ:
        return "-".join(["slurm", *(re.sub(r"\W", "_", os.environ.get(key, "0")) for key in _SLURM_STEP)])
    if launch.launcher == "openmpi" and os.environ.get("PMIX_NAMESPACE"):
        return "pmix-" + re.sub(r"\W", "_", os.environ["PMIX_NAMESPACE"])
    launcher = os.getppid()
    # what lies between is scripts: they were started with the variables of this rank, their launcher was not
    while (above := _parent(launcher)) and _is_of_this_rank(launcher):
        launcher = above
    return f"{launcher}-{identity(launcher)['born'] or 0}"


_SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
_RANK_KEYS = ("PMI_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "RANK", "WORLD_SIZE")


def _is_of_this_rank(process: int) -> bool:
    try:
        words = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    mine = {f"{key}={os.environ[key]}".encode() for key in _RANK_KEYS if key in os.environ}
    return bool(mine) and mine <= set(words)


def _parent(process: int) -> int:
    """Number of a process's parent; 0 where it can't be seen, as above a container's first one."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _wait_for_port(meeting_point: Path, launch: Launch, timeout: timedelta) -> int:
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            port = int(meeting_point.read_text(encoding="utf-8"))
            socket.create_connection(("127.0.0.1", port), 5).close()  # not what an earlier run left that was killed
            return port
        time.sleep(0.05)
    raise TimeoutError(
        f"the main rank did not say its port in {meeting_point}: it was not started by the same launcher, or has another TMPDIR"
    )


def interface_towards(host: str) -> str | None:
    """Name of the network interface by which this host reaches ``host``, or None where that can't be told."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # a datagram socket sends nothing by connecting
            own = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                try:
                    # SIOCGIFADDR: struct ifreq with the name in, the IPv4 address out at byte 20
                    answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))
                except OSError:
                    continue  # an interface without an address
                if socket.inet_ntoa(answer[20:24]) == own:
                    return name
    except OSError:
        pass
    return None
