"""The ranks arranged for tensor, pipeline and data parallelism: the numbers of a layout, and its process groups."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megarewarm.config.execution import ParallelConfig
from megarewarm.errors import UserError
from megarewarm.parallel.ranks import Ranks

AXES = ("pipeline", "replicate", "shard", "tensor")


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


def as_patient_as_all(group: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup:
    """``group``, whose collectives from now on wait as long as those of all ranks do; torch gives it a default of its own."""
    dist.distributed_c10d._set_pg_timeout(_patience_of_all(device), group)
    return group


def _patience_of_all(device: torch.device) -> timedelta:
    patience: timedelta = dist.distributed_c10d._get_default_group()._get_backend(device).options._timeout
    return patience


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
        for axis in AXES:
            as_patient_as_all(self.devices.get_group(axis), self.device)
        if layout.tensor > 1:
            self.tensor = self.devices.get_group("tensor")
        if layout.pipeline > 1:
            # made with their patience: what is set afterwards does not reach messages from one rank to another
            patience = _patience_of_all(self.device)
            for ranks_of_pipeline in self.devices.mesh.flatten(1).T.tolist():
                there, back = (dist.new_group(ranks_of_pipeline, timeout=patience) for _ in range(2))
                if rank in ranks_of_pipeline:
                    self.pipeline, self.way_back = there, back
        if layout.data > 1:
            axes = [axis for axis in ("replicate", "shard") if getattr(layout, axis) > 1]
            data = self.devices.get_group(axes[0]) if len(axes) == 1 else self.devices[tuple(axes)]._flatten().get_group()
            self.data = as_patient_as_all(data, self.device)

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
