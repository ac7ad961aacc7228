"""The ranks arranged for tensor, pipeline and data parallelism: the numbers of a layout, and its process groups."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from megarewarm.config.execution import ParallelConfig
from megarewarm.errors import UserError
from megarewarm.parallel.groups import new_groups
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

    @property
    def grid(self) -> Tensor:
        """The numbers of all ranks, in a dimension for each of ``AXES``."""
        shape = (self.pipeline, self.replicate, self.shard, self.tensor)
        return torch.arange(math.prod(shape)).view(shape)

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


def ranks_along(grid: Tensor, *axes: str) -> list[list[int]]:
    """The ranks of ``grid``, whose dimensions are ``AXES``, in groups of those that differ along ``axes`` only."""
    places = [AXES.index(axis) for axis in axes]
    size = math.prod(grid.shape[place] for place in places)
    return grid.permute(*(place for place in range(len(AXES)) if place not in places), *places).reshape(-1, size).tolist()


class Mesh:
    """A layout's process groups, seen from one rank. Groups of a single rank are None: they need no communication."""

    def __init__(self, ranks: Ranks, layout: Layout) -> None:
        self.ranks, self.layout, self.device = ranks, layout, ranks.device
        self.tensor: dist.ProcessGroup | None = None
        self.pipeline: dist.ProcessGroup | None = None
        self.reverse_group: dist.ProcessGroup | None = None  # the pipeline's ranks again, for messages to earlier ones
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
        grid = layout.grid
        groups = {axis: new_groups(ranks_along(grid, axis)) for axis in AXES}
        held = [group for group in groups.values() if group is not None]  # this rank is in one along each axis
        self.devices = DeviceMesh.from_group(held, ranks.device.type, mesh=grid, mesh_dim_names=AXES)
        if layout.tensor > 1:
            self.tensor = groups["tensor"]
        if layout.pipeline > 1:
            self.pipeline, self.reverse_group = groups["pipeline"], new_groups(ranks_along(grid, "pipeline"))
        if layout.replicate > 1 and layout.shard > 1:
            self.data = new_groups(ranks_along(grid, "replicate", "shard"))
        elif layout.data > 1:
            self.data = groups["replicate" if layout.replicate > 1 else "shard"]

    def submesh(self, *axes: str) -> DeviceMesh:
        """The ranks along ``axes``, which are in the order of ``AXES``."""
        assert self.devices is not None
        key = tuple(axes)
        if key not in self._submeshes:
            self._submeshes[key] = self.devices[key]
        return self._submeshes[key]
