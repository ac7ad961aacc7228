"""Connecting the ranks: one process group, the device of each rank, and the words for when they don't meet."""

from __future__ import annotations

import os
import re
import socket
import stat
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megarewarm.config.execution import ParallelConfig
from megarewarm.errors import UserError
from megarewarm.parallel.launchers import Launch

AXES = ("pipeline", "replicate", "shard", "tensor")


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    world_size: int
    device: torch.device
    launcher: str = "none"
    store: dist.Store | None = None

    def report(self, step: int) -> None:
        """Leave word that this rank has computed its part of ``step``, so that the others can tell who has not."""
        if self.store is not None:
            self.store.set(f"step/{self.rank}", str(step))

    def give_up(self, patience: float = 10.0) -> str:
        """Leave word that a collective has failed here, and say in words which ranks it waited for.

        Ranks that are alive fail within seconds of each other and leave the same word: those that are silent after
        ``patience`` seconds are gone or hang. Where all have spoken, the ones furthest behind are named.
        """
        if self.store is None:
            return "another rank"
        try:
            self.store.set(f"gave_up/{self.rank}", "")
            deadline = time.monotonic() + patience
            silent = [rank for rank in range(self.world_size) if rank != self.rank]
            while len(silent) > 1 and time.monotonic() < deadline:
                time.sleep(0.2)
                silent = [rank for rank in silent if not self.store.check([f"gave_up/{rank}"])]
            silent = [rank for rank in silent if not self.store.check([f"gave_up/{rank}"])]
            steps = {rank: self._last_step(rank) for rank in silent or range(self.world_size)}
        except RuntimeError:
            return "rank 0, which holds the store"
        behind = silent or [rank for rank, step in steps.items() if step == min(steps.values())]
        if len(behind) == self.world_size:
            return "one of the other ranks"
        shown = ", ".join(map(str, behind[:8])) + (", ..." if len(behind) > 8 else "")
        return f"rank{'s' * (len(behind) > 1)} {shown} (last heard of in step {max(0, min(steps.values()))})"

    def _last_step(self, rank: int) -> int:
        assert self.store is not None
        return int(self.store.get(f"step/{rank}")) if self.store.check([f"step/{rank}"]) else -1

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks and writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


@dataclass(frozen=True)
class Layout:
    """How many ranks each kind of parallelism has. Neighbouring ranks are tensor ranks, then shards, replicas, stages."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    tensor: int = 1

    @property
    def data(self) -> int:
        """Ranks that read different samples."""
        return self.replicate * self.shard

    @property
    def model(self) -> int:
        """Ranks that hold one replica of the model together, sharding of its data-parallel copies aside."""
        return self.pipeline * self.tensor

    def __str__(self) -> str:
        data = f"{self.replicate}x{self.shard}" if self.replicate > 1 and self.shard > 1 else str(self.data)
        return f"pipeline {self.pipeline} x data {data} x tensor {self.tensor}"


def choose_layout(parallel: ParallelConfig, world_size: int) -> Layout:
    """The layout of ``world_size`` ranks that ``parallel`` asks for. Raises ``UserError`` naming the number to change."""
    model = parallel.pipeline * parallel.tensor
    if world_size % model:
        raise UserError(
            f"parallel: pipeline {parallel.pipeline} x tensor {parallel.tensor} = {model} ranks hold one model, the launcher "
            f"started {world_size}; start a multiple of {model}, or change parallel.pipeline or parallel.tensor"
        )
    data = world_size // model
    if parallel.data is not None and parallel.data != data:
        raise UserError(
            f"parallel.data: {parallel.data} is asked for, the launcher started {world_size} ranks, which leaves {data}; start "
            f"{parallel.data * model} or remove the key"
        )
    if parallel.sharding == "none":
        return Layout(parallel.pipeline, data, 1, parallel.tensor)
    shard = parallel.shard_ranks or data
    if data % shard:
        raise UserError(
            f"parallel.shard_ranks: {shard} does not divide the {data} data-parallel ranks; choose a divisor of {data}"
        )
    return Layout(parallel.pipeline, data // shard, shard, parallel.tensor)


class Mesh:
    """The ranks arranged by a layout, seen from one of them. Groups of a single rank are None: nothing is sent there."""

    def __init__(self, ranks: Ranks, layout: Layout) -> None:
        self.ranks, self.layout, self.device = ranks, layout, ranks.device
        self.tensor: dist.ProcessGroup | None = None
        self.pipeline: dist.ProcessGroup | None = None
        self.way_back: dist.ProcessGroup | None = None  # the pipeline's ranks again, for messages to earlier ones
        self.data: dist.ProcessGroup | None = None
        self.devices: DeviceMesh | None = None
        self._submeshes: dict[tuple[str, ...], DeviceMesh] = {}
        rank = ranks.rank
        self.tensor_rank = rank % layout.tensor
        self.shard_rank = rank // layout.tensor % layout.shard
        self.data_rank = rank // layout.tensor % layout.data
        self.pipeline_rank = rank // (layout.tensor * layout.data)
        if ranks.world_size == 1:
            return
        self.devices = init_device_mesh(
            ranks.device.type, (layout.pipeline, layout.replicate, layout.shard, layout.tensor), mesh_dim_names=AXES
        )
        if layout.tensor > 1:
            self.tensor = self.devices.get_group("tensor")
        if layout.pipeline > 1:
            self.pipeline = self.devices.get_group("pipeline")
            for ranks_of_pipeline in self.devices.mesh.flatten(1).T.tolist():
                group = dist.new_group(ranks_of_pipeline)
                if rank in ranks_of_pipeline:
                    self.way_back = group
        if layout.data > 1:
            axes = [axis for axis in ("replicate", "shard") if getattr(layout, axis) > 1]
            self.data = self.devices.get_group(axes[0]) if len(axes) == 1 else self.devices[tuple(axes)]._flatten().get_group()

    def submesh(self, *axes: str) -> DeviceMesh:
        """The ranks along ``axes``, the first one outermost."""
        assert self.devices is not None
        key = tuple(axes)
        if key not in self._submeshes:
            if list(axes) == [axis for axis in AXES if axis in axes]:
                self._submeshes[key] = self.devices[key]
            else:
                # DTensors divided twice along one dimension: DeviceMesh only gives its axes in their own order
                groups = [self.devices.get_group(axis) for axis in axes]
                order = [*(axis for axis in AXES if axis not in axes), *axes]
                everywhere = self.devices.mesh.permute(*(AXES.index(axis) for axis in order))
                ranks = everywhere.reshape(-1, *everywhere.shape[-len(axes) :])
                mine = next(part for part in ranks if (part == self.ranks.rank).any())
                self._submeshes[key] = DeviceMesh.from_group(groups, self.device.type, mesh=mine, mesh_dim_names=key)
        return self._submeshes[key]


def connect(launch: Launch, device: str, timeout_minutes: float) -> Ranks:
    """The ranks of ``launch`` on ``device`` (auto, cpu or cuda): NCCL on GPUs, gloo on CPUs, nothing for one rank.

    Raises ``UserError`` when there is no such device, and when the ranks don't meet in time.
    """
    chosen = _device(launch, device)
    if launch.world_size == 1:
        return Ranks(0, 1, chosen)
    timeout = timedelta(minutes=timeout_minutes)
    try:
        store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", _store(launch, timeout))
        _wait_for_all(store, launch, timeout)
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
        )
    except (RuntimeError, dist.DistError, TimeoutError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"the {launch.world_size} ranks did not meet (rank {launch.rank} of launcher {launch.launcher}, on host "
            f"{socket.gethostname()}, master {launch.master_addr}:{launch.master_port}): {first}; check that every rank was "
            f"started and that the master's port is free and reachable"
        ) from error
    return Ranks(launch.rank, launch.world_size, chosen, launch.launcher, store)


def _wait_for_all(store: dist.Store, launch: Launch, timeout: timedelta) -> None:
    """Return once every rank has come. Raises ``TimeoutError`` naming those that have not."""
    store.set(f"here/{launch.rank}", socket.gethostname())
    if launch.rank != 0:
        store.wait(["all"], timeout)
        return
    missing = list(range(launch.world_size))
    deadline = time.monotonic() + timeout.total_seconds()
    while missing := [rank for rank in missing if not store.check([f"here/{rank}"])]:
        if time.monotonic() > deadline:
            shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise TimeoutError(
                f"no word from rank{'s' * (len(missing) > 1)} {shown} in {timeout.total_seconds() / 60:g} minutes"
            )
        time.sleep(0.05)
    store.set("all", "here")


def _device(launch: Launch, device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if launch.local_rank >= count:
        raise UserError(
            f"training.device: rank {launch.rank} needs GPU {launch.local_rank} of host {socket.gethostname()}, which has "
            f"{count}; start fewer ranks there or set it to cpu"
        )
    torch.cuda.set_device(launch.local_rank)
    return torch.device("cuda", launch.local_rank)


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
        store = dist.TCPStore("127.0.0.1", 0, launch.world_size, True, timeout=timeout, wait_for_workers=False)
        partial = meeting_point.with_suffix(".partial")
        partial.write_text(str(store.port))
        partial.rename(meeting_point)
        return store
    port = _wait_for_port(meeting_point, launch, timeout)
    return dist.TCPStore("127.0.0.1", port, launch.world_size, False, timeout=timeout, wait_for_workers=False)


def _meeting_point(launch: Launch) -> Path:
    """A file that all ranks of this job on this host agree on and no other job uses: named after their common parent."""
    parent = os.getppid()
    try:
        # field 22 of /proc/PID/stat is the start time, which tells a reused process number from the old one
        born = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        born = "0"
    folder = Path(tempfile.gettempdir()) / f"megarewarm-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise UserError(f"{folder}: belongs to somebody else; remove it or set TMPDIR to another folder")
    return folder / f"port-{parent}-{born}-{launch.master_port}-{launch.world_size}"


def _wait_for_port(meeting_point: Path, launch: Launch, timeout: timedelta) -> int:
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        if meeting_point.is_file():
            return int(meeting_point.read_text())
        time.sleep(0.05)
    raise TimeoutError(f"the main rank did not say its port in {meeting_point}")


_LOST = re.compile(r"connection (closed|reset|refused)|timed? ?out|broken pipe|nccl.*(error|abort)|peer", re.IGNORECASE)


def is_loss(error: BaseException) -> bool:
    """Whether ``error`` came out of a collective because another rank is gone or hangs."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))
