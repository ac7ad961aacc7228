"""The parts of a model that a rank computes: its pipeline stages, with its share of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from megarewarm.config.execution import ParallelConfig
from megarewarm.config.model import ModelConfig
from megarewarm.model.fused import Operations, fuse
from megarewarm.model.parameters import Card, cards
from megarewarm.model.size import stage_costs
from megarewarm.model.transformer import Transformer
from megarewarm.parallel import pipeline, tensor
from megarewarm.parallel.mesh import Mesh
from megarewarm.parallel.placement import Placement, place
from megarewarm.parallel.tensor_ranks import TensorRanks


@dataclass(frozen=True)
class Cut:
    """``modules``: on the meta device, one for each of this rank's stages, whose ``numbers`` are out of ``count``; the whole
    model without a pipeline. ``layers``: of every stage. ``placements``: this rank's part of every parameter. ``tensor``: the
    ranks it shares layers with."""

    config: ModelConfig
    modules: list[nn.Module]
    numbers: list[int]
    layers: list[range]
    tensor: TensorRanks | None
    cards: Mapping[str, Card]
    placements: dict[str, Placement]

    @property
    def count(self) -> int:
        """Stages of the pipeline."""
        return len(self.layers)

    @property
    def has_last(self) -> bool:
        """Whether this rank holds the last stage, which ends with the head."""
        return self.count - 1 in self.numbers

    @property
    def ends_meet(self) -> bool:
        """Whether this rank holds both ends of a V-shaped pipeline, and these share one matrix."""
        return self.config.tie_embeddings and self.count > 1 and 0 in self.numbers and self.has_last


def cut(config: ModelConfig, mesh: Mesh, parallel: ParallelConfig, sequence_length: int, operations: Operations | None) -> Cut:
    """The parts of a model of ``config`` on this rank of ``mesh``. Its stages are balanced for its own layers.
    ``operations``: the fused ones; None: plain PyTorch's."""
    layout = mesh.layout
    with torch.device("meta"):
        model = Transformer(config)
    every = cards(config)
    sequence = layout.tensor > 1 and parallel.sequence
    ranks: TensorRanks | None = None
    if mesh.tensor is not None:
        ranks = TensorRanks(mesh.tensor, sequence)
        tensor.shard(model, ranks)
    placements = {name: place(card, mesh.tensor_rank, layout.tensor, sequence) for name, card in every.items()}
    if operations is not None:
        fuse(model, operations, sharded=parallel.sharding != "none" and layout.data > 1)
    numbers, layers = [0], [range(config.num_layers)]
    modules: list[nn.Module] = [model]
    if layout.pipeline > 1:
        per_rank = pipeline.stages_per_rank(parallel.schedule, parallel.stages_per_rank)
        count = layout.pipeline * per_rank
        layers = pipeline.balance(config.num_layers, count, *stage_costs(config, sequence_length))
        numbers = pipeline.my_stages(parallel.schedule, mesh.pipeline_rank, layout.pipeline, per_rank)
        modules = [pipeline.StageModule(model, layers[n], first=n == 0, last=n == count - 1) for n in numbers]
    return Cut(config, modules, numbers, layers, ranks, every, placements)
