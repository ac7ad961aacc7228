"""How torch.distributed.checkpoint saves and loads a rank's slices: each offset is explicit, not derived."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megarewarm.parallel.placement import TensorSlice


def local(tensor: Tensor | TensorSlice) -> Tensor:
    """The part of ``tensor`` in this rank's memory."""
    return tensor.local if isinstance(tensor, TensorSlice) else tensor


def tile(shape: Sequence[int], boxes: Iterable[tuple[Sequence[int], Sequence[int]]]) -> bool:
    """Whether ``boxes``, (offsets, sizes), cover every place of ``shape`` exactly once. Empty boxes don't count.

    The corners of a box, each with the sign (-1)^(number of its upper ends), say all about it: what they add up to at each
    place is the mixed difference of how often the places are covered, so it is that of the whole if and only if each is
    covered once. One pass, in any order.
    """
    corners: Counter[tuple[int, ...]] = Counter()
    for sign, (offsets, sizes) in ((-1, ((0,) * len(shape), shape)), *((1, box) for box in boxes)):
        for ends in product((0, 1), repeat=len(shape)):
            corners[tuple(o + n * end for o, n, end in zip(offsets, sizes, ends, strict=True))] += sign * (-1) ** sum(ends)
    return not any(corners.values())


def _box(tensor: Tensor | TensorSlice) -> ChunkStorageMetadata:
    offsets = tensor.offsets if isinstance(tensor, TensorSlice) else (0,) * tensor.dim()
    return ChunkStorageMetadata(torch.Size(offsets), local(tensor).shape)


class SlicesToSave(DefaultSavePlanner):
    """Saves the slices, or whole tensors, of ``tensors``. Of replicated tensors one rank writes its copy."""

    def __init__(self, tensors: Mapping[str, Tensor | TensorSlice]) -> None:
        super().__init__()
        self._tensors = tensors

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, tensor in self._tensors.items():
            if isinstance(tensor, TensorSlice) and tensor.local.numel() == 0:
                continue
            box = _box(tensor)
            data = TensorWriteData(box, TensorProperties.create_from_tensor(local(tensor)), torch.Size(tensor.shape))
            items.append(WriteItem(MetadataIndex(name, box.offsets), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items, planner_data=self.mappings)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Any]:
        plans, metadata = super().create_global_plan(all_plans)
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            if not tile(entry.size, [(box.offsets, box.sizes) for box in entry.chunks]):
                raise AssertionError(f"the ranks' slices of {name} don't make up the whole; please report this")
        return plans, metadata

    def lookup_object(self, index: MetadataIndex) -> Any:
        return local(self._tensors[index.fqn])


class SlicesToLoad(DefaultLoadPlanner):
    """Fills the slices, or whole tensors, of ``tensors`` in place."""

    def __init__(self, tensors: Mapping[str, Tensor | TensorSlice]) -> None:
        super().__init__()
        self._tensors = tensors

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, tensor in self._tensors.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            if local(tensor).numel():
                items += create_read_items_for_chunk_list(name, stored, [_box(tensor)])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return local(self._tensors[index.fqn])
