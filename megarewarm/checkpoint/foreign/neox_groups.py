"""Which parameters lie in each group of an optimizer of GPT-NeoX, on one model rank, and in which order.

With ZeRO the files say it (``param_shapes``, ``param_slice_mappings``). Without they don't: the groups are what decays, then
norms and biases, each in the order of the modules; and a pipeline stage holds the modules that follow those of the stage
before it, as many as its state has values for. Embeddings that are tied come first on every stage that has them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from megarewarm.checkpoint.foreign.neox_folder import NeoXFolder
from megarewarm.checkpoint.foreign.neox_names import whole_of
from megarewarm.errors import UserError
from megarewarm.model.parameters import EMBEDDING, cards, kind_of

Member = tuple[str, tuple[int, ...], int]
"""A stored parameter's name here (``NeoXFolder.names``), the shape of the tensor rank's part, and the padding that follows it
in the flat tensor."""

_MASTERS = ("single_partition_of_fp32_groups", "local_sub_partitions_of_fp32_groups", "fp32_groups_flat", "fp32_groups")


def masters_of(state: Mapping[str, Any]) -> Sequence[Any] | None:
    """The fp32 masters of a rank by group, each a tensor or several; None if the weights are masters themselves."""
    return next((state[key] for key in _MASTERS if key in state), None)


def base_of(state: Mapping[str, Any]) -> Any:
    """The state of Adam itself: torch's mapping, or a list by group."""
    return state.get("base_optimizer_state", state.get("optimizer_state_dict", state))


def recorded_groups(stored: Any, states: Sequence[Mapping[str, Any]], folder: NeoXFolder) -> list[list[Member]] | None:
    """The groups according to ``param_shapes`` (``stored``) or DeepSpeed's map of slices; None without both."""
    if isinstance(stored, Sequence):
        paddings = states[0].get("param_alignment_paddings") or [[0] * len(group) for group in stored]
        return [
            [
                (name, tuple(shape), int(padding))
                for (key, shape), padding in zip(group.items(), padded, strict=True)
                if (name := folder.our_name(key)) is not None
            ]
            for group, padded in zip(stored, paddings, strict=True)
        ]
    if isinstance(stored, Mapping):  # Pythia's: of all groups together
        named = [(folder.our_name(key), tuple(shape)) for key, shape in stored.items()]
        return _divided([(name, shape, 0) for name, shape in named if name is not None], _count(states[0]))
    maps = [state.get("param_slice_mappings") for state in states]
    if maps and all(isinstance(each, Sequence) for each in maps):
        groups = []
        for pieces in zip(*maps, strict=True):  # the data-parallel ranks hold what follows each other
            names = dict.fromkeys(folder.our_name(key) for piece in pieces for key in piece)
            groups.append([(name, folder.part_shape(name), 0) for name in names if name is not None])
        return groups
    return None


def groups_by_stage(states: Mapping[int, Sequence[Mapping[str, Any]]], folder: NeoXFolder) -> dict[int, list[list[Member]]]:
    """The groups of every model rank (a pipeline stage's tensor ranks follow each other) where no file says them. Raises
    ``UserError`` where the parameters can't be divided into stages as large as the states are."""
    found = {}
    for tensor_rank in range(folder.tensor_ranks):
        modules = _modules(folder, tensor_rank)
        ranks = sorted(rank for rank in states if rank % folder.tensor_ranks == tensor_rank)
        position = 0
        for rank in ranks:
            wanted = _sizes(states[rank][0])
            found[rank], position = _stage(modules, position, wanted, folder, rank)
        if position != len(modules):
            raise UserError(
                f"{folder.where}: the optimizer's files hold nothing of {modules[position][0][0]}; copy mp_rank_* of every rank"
            )
    return found


def _modules(folder: NeoXFolder, tensor_rank: int) -> list[list[Member]]:
    """The parameters by module of GPT-NeoX's sequence: embedding, each layer, the last norm, the head."""
    modules: dict[str, list[Member]] = {}
    every = cards(folder.model_config)
    for name in folder.names(tensor_rank):
        modules.setdefault(every[whole_of(name)].group, []).append((name, folder.part_shape(name), 0))
    order = dict.fromkeys(card.group for card in every.values())
    return [modules[module] for module in order if module in modules]


def _stage(
    modules: Sequence[list[Member]], first: int, wanted: list[list[int]], folder: NeoXFolder, rank: int
) -> tuple[list[list[Member]], int]:
    """(groups of the stage whose modules begin with ``first``, the first module of the next). ``wanted``: see ``_sizes``."""
    for last in range(first, len(modules)):
        own = [member for module in modules[first : last + 1] for member in module]
        tied = [] if first == 0 or not folder.model_config.tie_embeddings else [m for m in modules[0] if m[0] == EMBEDDING]
        for members in (own, tied + own) if tied else (own,):
            groups = _divided(members, len(wanted))
            if len(groups) == len(wanted) and all(_fits(group, sizes) for group, sizes in zip(groups, wanted, strict=True)):
                return groups, last + 1
    held = sum(sum(sizes) for sizes in wanted)
    raise UserError(
        f"{folder.rank_files[rank]}: its optimizer state has {held:,} values in {len(wanted)} groups, not those of "
        f"the parameters from {modules[min(first, len(modules) - 1)][0][0]} on; it is of another run, or some were frozen"
    )


def _fits(group: Sequence[Member], sizes: Sequence[int]) -> bool:
    numbers = [math.prod(shape) for _, shape, _ in group]
    return numbers == list(sizes) if len(sizes) == len(numbers) else len(sizes) == 1 and sum(numbers) == sizes[0]


def _sizes(state: Mapping[str, Any]) -> list[list[int]]:
    """Values of Adam's first moment by group: of each parameter, or of the flat tensor of all of them."""
    base = base_of(state)
    groups = [group["params"] for group in base["param_groups"]]
    return [[base["state"][i]["exp_avg"].numel() for i in group if i in base["state"]] for group in groups]


def _divided(members: list[Member], groups: int) -> list[list[Member]]:
    """Without weight decay GPT-NeoX makes one group; groups that are empty on a rank are left out."""
    if groups == 1:
        return [members]
    parts = [[m for m in members if kind_of(whole_of(m[0])).decays is decays] for decays in (True, False)]
    return [part for part in parts if part]


def _count(state: Mapping[str, Any]) -> int:
    masters, base = masters_of(state), base_of(state)
    if masters is not None:
        return len(masters)
    return len(base["param_groups"]) if isinstance(base, Mapping) and "param_groups" in base else 2


def pieces_of(state: Mapping[str, Any], group: int, what: str) -> list[Tensor]:
    """The pieces of one data-parallel rank of masters ('master') or a moment, in order."""
    if what == "master":
        masters = masters_of(state)
        if masters is None:
            return []
        return [masters[group]] if isinstance(masters[group], Tensor) else list(masters[group])
    base = base_of(state)
    if isinstance(base, Mapping):  # torch's own form
        return [base["state"][index][what] for index in base["param_groups"][group]["params"] if index in base["state"]]
    held = base[group]  # the lean form: by group, or by group and sub-partition
    return [item[what] for item in ([held] if isinstance(held, Mapping) else held)]


def steps_of(state: Mapping[str, Any]) -> list[int]:
    """Adam's count of each group: the largest in it, as DeepSpeed's FusedAdam raises only that of the last parameter."""
    base = base_of(state)
    if isinstance(base, Mapping):
        groups = [
            [base["state"].get(index, {}).get("step") for index in group["params"]] + [group.get("step")]
            for group in base["param_groups"]
        ]
    else:
        groups = [[item.get("step") for item in ([held] if isinstance(held, Mapping) else held)] for held in base]
    counts = [max((int(step) for step in group if step is not None), default=None) for group in groups]
    found = [count for count in counts if count is not None]
    if (whole := state.get("base_optimizer_state_step")) is not None:
        found = [max(count, int(whole)) for count in found] or [int(whole)]
    return found
