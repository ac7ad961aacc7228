"""Connecting the ranks: one process group, the device of each rank, and the messages if ranks are missing."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import struct
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from megarewarm.errors import EXIT_RANK_LOST, UserError
from megarewarm.parallel.launchers import DEFAULT_PORT, LOOPBACK, Launch
from megarewarm.parallel.meeting_place import forget_port, named_job, refusal, say_port, wait_for_port
from megarewarm.parallel.ranks import Ranks

_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


def _shown() -> str:
    """The variables that hide GPUs from this process, for messages."""
    return "".join(f" ({key}={os.environ[key]})" for key in _VISIBLE if key in os.environ)


class RanksDidNotMeet(UserError):
    """A rank did not start, can't be reached, or died before all had connected: a retry may succeed."""

    exit_code = EXIT_RANK_LOST


def connect(launch: Launch, device: str, timeout_minutes: float) -> Ranks:
    """The ranks of ``launch`` on ``device`` (auto, cpu or cuda): NCCL on GPUs, gloo on CPUs, nothing for one rank. Raises
    ``UserError`` when there is no such device, ``RanksDidNotMeet`` when the ranks don't meet in time."""
    chosen, refused = torch.device("cpu"), ""
    try:
        chosen = choose_device(launch, device)
    except UserError as error:
        if launch.world_size == 1:
            raise
        refused = str(error)  # reported through the store, because the others would wait for this rank
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
        _wait_for_all(store, launch, timeout, "here", _Report(refused, _gpu(chosen)))
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
        )
        # a rank that ends at once, on bad input, would close connections that others are still opening
        _wait_for_all(store, launch, timeout, "connected", _Report())
        if launch.rank == 0 and launch.local_world_size == launch.world_size and launch.launcher != "torchrun":
            forget_port(launch)
    except (RuntimeError, dist.DistError, TimeoutError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RanksDidNotMeet(
            f"the {launch.world_size} ranks did not meet (rank {launch.rank} of launcher {launch.launcher}, on host "
            f"{socket.gethostname()}, master {_address(launch)}): {first}; check that every rank was "
            f"started and that the master's port is free and reachable"
        ) from error
    return Ranks(launch.rank, launch.world_size, chosen, launch.launcher, store, launch.began)


def tell_main_rank(why: str, environ: Mapping[str, str]) -> None:
    """Send ``refuse`` to the main rank on another host, through its store at MASTER_ADDR, for at most 10 s."""
    address = environ.get("MASTER_ADDR", "").removeprefix("[").removesuffix("]")
    if not address or address in LOOPBACK or named_job() is None:  # without a name, the store may belong to another job
        return
    with contextlib.suppress(RuntimeError, dist.DistError, ValueError):
        port = int(environ.get("MASTER_PORT", DEFAULT_PORT))
        store = dist.TCPStore(address, port, None, False, timeout=timedelta(seconds=10), wait_for_workers=False)
        attempt = f"attempt{environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        dist.PrefixStore(attempt, store).set(f"refused/{named_job()}", why)


def _address(launch: Launch) -> str:
    host = f"[{launch.master_addr}]" if ":" in launch.master_addr else launch.master_addr
    return f"{host}:{launch.master_port}"


class _Report(NamedTuple):
    """A rank's report to the main rank: why it won't start, and its GPU (empty: no reason, none)."""

    refused: str = ""
    gpu: str = ""


def _wait_for_all(store: dist.Store, launch: Launch, timeout: timedelta, what: str, word: _Report) -> None:
    """Return when every rank has reported. Raises ``TimeoutError`` naming missing ranks, and ``UserError`` on every rank if
    one refuses or two conflict."""
    refused = f"refused/{named_job()}"
    # torchrun may restart its ranks on the same store, and numbers them itself
    if launch.launcher != "torchrun" and store.add(f"claims_{what}/{launch.rank}", 1) > 1:
        store.set(refused, f"two processes are rank {launch.rank} of {launch.world_size}: give each one its own RANK")
    store.set(f"{what}/{launch.rank}", json.dumps(word))
    if launch.rank != 0:
        store.wait([f"all_{what}"], timeout)
        if why := store.get(f"all_{what}").decode():
            raise UserError(why)
        return
    words: dict[int, _Report] = {}
    deadline = time.monotonic() + timeout.total_seconds()
    why = ""
    while not why and (missing := [rank for rank in range(launch.world_size) if rank not in words]):
        if time.monotonic() > deadline:
            shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise TimeoutError(
                f"no word from rank{'s' * (len(missing) > 1)} {shown} in {timeout.total_seconds() / 60:g} minutes"
            )
        time.sleep(0.05)
        for rank in missing:
            if store.check([f"{what}/{rank}"]):
                words[rank] = _Report(*json.loads(store.get(f"{what}/{rank}")))
        why = _conflict(words) or refusal() or (store.get(refused).decode() if store.check([refused]) else "")
    store.set(f"all_{what}", why)
    if why:
        time.sleep(2)  # this process owns the store: ranks that have connected must read the answer
        raise UserError(why)


def _conflict(words: Mapping[int, _Report]) -> str:
    """Why connected ranks can't start; empty if they can."""
    owner: dict[str, int] = {}
    for rank, word in words.items():
        if word.refused:
            return word.refused
        if word.gpu and owner.setdefault(word.gpu, rank) != rank:
            return (
                f"ranks {owner[word.gpu]} and {rank} would share one GPU ({word.gpu}): give each rank its own, by LOCAL_RANK "
                f"or CUDA_VISIBLE_DEVICES, or start fewer ranks on the host"
            )
    return ""


def _gpu(device: torch.device) -> str:
    """A unique name of a GPU, independent of its number on the host; empty for a CPU."""
    if device.type != "cuda":
        return ""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))  # torch of before 2.5 has none


def choose_device(launch: Launch, device: str) -> torch.device:
    """The device of this rank. Raises ``UserError`` if it does not exist."""
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


_device = choose_device  # the former name


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
    if main:
        store = dist.TCPStore("127.0.0.1", 0, launch.world_size, True, timeout=timeout, wait_for_workers=False)
        say_port(launch, store.port)
        return store
    port = wait_for_port(launch, timeout)
    return dist.TCPStore("127.0.0.1", port, launch.world_size, False, timeout=timeout, wait_for_workers=False)


def interface_towards(host: str) -> str | None:
    """Name of the network interface by which this host reaches ``host``, or None if unknown."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # a datagram socket sends nothing by connecting
            own = probe.getsockname()[0].partition("%")[0]
            if family == socket.AF_INET6:
                return _interface_of_6(own)
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


def _interface_of_6(address: str) -> str | None:
    """The interface that has this IPv6 address: Linux lists them as 32 hex digits, four numbers and the name."""
    digits = socket.inet_pton(socket.AF_INET6, address).hex()
    for line in Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines():
        if line.startswith(digits):
            return line.split()[-1]
    return None
