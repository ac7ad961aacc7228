"""Adam's moments and the fp32 masters in GPT-NeoX's files, by parameter: ZeRO stages 0, 1 and 2, today's and Pythia's.

ZeRO lays the parameters of a group one after another into a flat tensor, pads its end and gives each data-parallel rank a
partition. DeeperSpeed 0.3.15, which trained Pythia, cut that tensor into intervals first and each interval into partitions,
so that its partitions come in the order (interval, rank). Both are read here as segments of one flat tensor, cut by the
parameters' shapes: those that decay first, then norms and biases, each in the order of the modules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megarewarm.checkpoint.foreign.neox_folder import NeoXFolder
from megarewarm.checkpoint.foreign.neox_groups import (
    Member,
    groups_by_stage,
    masters_of,
    pieces_of,
    recorded_groups,
    steps_of,
)
from megarewarm.checkpoint.foreign.pickles import InertRecord, read_pickle
from megarewarm.errors import UserError

_ZERO_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")

What = Literal["master", "exp_avg", "exp_avg_sq"]
MOMENTS: tuple[What, ...] = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Slice:
    """Where a parameter lies: its part's shape and first element in the flat tensor of ``group`` on model rank ``rank``."""

    rank: int
    group: int
    first: int
    shape: tuple[int, ...]


class NeoXOptimizer:
    """The optimizer of a ``global_stepN`` folder. Raises ``UserError`` for files that are missing or don't fit the weights."""

    def __init__(self, folder: NeoXFolder) -> None:
        self._folder = folder
        self._states: dict[int, list[Any]] = {}  # model rank -> optimizer state of each data-parallel rank
        self._shapes: dict[int, Any] = {}
        self._read_files()
        # name -> where it lies, by tensor rank
        self._where: dict[str, dict[int, _Slice]] = {}
        for rank, groups in self._groups().items():
            self._index(rank, groups)
        missing = sorted(set(folder.names()) - set(self._where))
        if missing:
            raise UserError(
                f"{folder.where}: the optimizer's files hold nothing of {missing[0]}; copy all of *_optim_states.pt"
            )

    @property
    def has_masters(self) -> bool:
        """Whether fp32 masters are there (not for training in fp32 without ZeRO, whose weights are masters themselves)."""
        return masters_of(next(iter(self._states.values()))[0]) is not None

    @property
    def completed_steps(self) -> int | None:
        """Adam's step count, None if the files don't say. Raises ``UserError`` if parameters have different ones."""
        counts = {count for states in self._states.values() for state in states for count in steps_of(state)}
        if len(counts) > 1:
            raise UserError(
                f"{self._folder.where}: Adam's step count is {min(counts):,} for some parameters and {max(counts):,} for "
                f"others; copy all files of one checkpoint, or set start.moments and start.optimizer_step to 'reset'"
            )
        return counts.pop() if counts else None

    @property
    def loss_scale(self) -> float | None:
        """The fp16 loss scale, None if there is none."""
        state = next(iter(self._states.values()))[0]
        scaler = state.get("loss_scaler")
        scale = scaler.get("cur_scale") if isinstance(scaler, InertRecord) else state.get("cur_scale")
        dynamic = state.get("dynamic_loss_scale", False)
        return float(scale) if scale is not None and dynamic else None

    def read(self, what: What, name: str) -> Tensor:
        """A moment or the master of parameter ``name``, whole, fp32."""

        def parts_of(piece: str) -> list[Tensor]:
            by_rank = self._where[piece]
            return [self._part(what, by_rank[rank]) for rank in sorted(by_rank)]

        added = what == "master" and self._folder.parallel_residual
        return self._folder.assembled(name, parts_of, biases_added=added)

    # ---- files -----------------------------------------------------------------------------------------------------

    def _read_files(self) -> None:
        folder = self._folder.folder
        found: dict[int, dict[int, Path]] = {}
        for file in folder.iterdir():
            if match := _ZERO_FILE.fullmatch(file.name):
                found.setdefault(int(match[2]), {})[int(match[1])] = file
        if not found:
            for rank, file in sorted(self._folder.rank_files.items()):
                state = read_pickle(file).get("optimizer")
                if not isinstance(state, Mapping):
                    raise UserError(f"{folder}: holds no optimizer state (no *_optim_states.pt); set start.moments to 'reset'")
                self._require_whole(file, state)
                self._states[rank] = [state]
            return
        for rank, files in sorted(found.items()):
            for data_rank in range(max(files) + 1):
                if data_rank not in files:
                    name = files[max(files)].name.replace(f"pp_rank_{max(files)}_", f"pp_rank_{data_rank}_")
                    raise UserError(f"{folder / name}: missing, those of other ranks are there; copy it as well")
            loaded = [read_pickle(files[data_rank]) for data_rank in sorted(files)]
            self._states[rank] = [state["optimizer_state_dict"] for state in loaded]
            stage = self._states[rank][0].get("zero_stage", 1)
            if int(getattr(stage, "arguments", (stage,))[0]) > 2:
                raise UserError(f"{files[0]}: written with ZeRO stage 3, only stages 0, 1 and 2 can be read")
            self._shapes[rank] = loaded[0].get("param_shapes")
            count = int(_first(self._states[rank][0].get("partition_count"), len(files)))
            if count != len(files):
                raise UserError(
                    f"{files[0]}: written by {count} data-parallel ranks, {len(files)} files are there; copy them all"
                )
        expected = set(self._folder.rank_files) or set(self._states)
        if lacking := sorted(expected - set(self._states)):
            raise UserError(f"{folder}: no optimizer files of model rank {lacking[0]}; copy zero_pp_rank_*_mp_rank_*")

    def _require_whole(self, file: Path, state: Mapping[str, Any]) -> None:
        """Refuse a state that is one of several partitions, the others of which are in no file."""
        counts = state.get("partition_count")
        count = max(counts) if isinstance(counts, list) else int(counts or 1)
        if count > 1:
            raise UserError(
                f"{file}: holds one of {count} partitions of the optimizer; the *_optim_states.pt of the others are missing; "
                f"copy them, or set start.moments to 'reset'"
            )

    # ---- where each parameter lies ---------------------------------------------------------------------------------

    def _index(self, rank: int, groups: list[list[Member]]) -> None:
        tensor_rank = rank % self._folder.tensor_ranks
        for group, members in enumerate(groups):
            first = 0
            for name, shape, padding in members:
                self._where.setdefault(name, {})[tensor_rank] = _Slice(rank, group, first, shape)
                first += math.prod(shape) + padding
            for what in ("master", *MOMENTS):
                held = sum(segment.numel() for segment in self._segments(rank, group, what))
                if held and held < first:
                    raise UserError(
                        f"{self._folder.where}: the files of model rank {rank} hold {held:,} values of {what} in group {group}"
                        f", its parameters have {first:,}; a file is of another run or cut off"
                    )

    def _groups(self) -> dict[int, list[list[Member]]]:
        """The parameters of each group of each model rank, in order."""
        found = {}
        for rank, states in self._states.items():
            stored = self._shapes.get(rank)
            if stored is None and rank in self._folder.rank_files:
                stored = read_pickle(self._folder.rank_files[rank]).get("param_shapes")
            groups = recorded_groups(stored, states, self._folder)
            if groups is None:
                return groups_by_stage(self._states, self._folder)
            found[rank] = groups
        return found

    # ---- values ----------------------------------------------------------------------------------------------------

    def _segments(self, rank: int, group: int, what: What) -> list[Tensor]:
        """The flat tensor of a group in pieces: interval by interval, in each the data-parallel ranks."""
        by_rank = [pieces_of(state, group, what) for state in self._states[rank]]
        intervals = max(len(segments) for segments in by_rank)
        return [segments[i].flatten() for i in range(intervals) for segments in by_rank if i < len(segments)]

    def _part(self, what: What, where: _Slice) -> Tensor:
        wanted = math.prod(where.shape)
        pieces, position = [], 0
        for segment in self._segments(where.rank, where.group, what):
            begin = max(where.first - position, 0)
            end = min(where.first + wanted - position, segment.numel())
            if begin < end:
                pieces.append(segment[begin:end])
            position += segment.numel()
        flat = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        return flat.detach().view(where.shape).float()  # masters were saved as parameters


def _first(*values: Any) -> Any:
    return next(value[0] if isinstance(value, list) else value for value in values if value is not None)
