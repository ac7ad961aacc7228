"""Writing native checkpoints from any other format, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem

from megarewarm.checkpoint.lineage import Lineage
from megarewarm.checkpoint.own import store
from megarewarm.checkpoint.own.folder import is_checkpoint
from megarewarm.checkpoint.own.state import TrainingState
from megarewarm.checkpoint.source import OpenedCheckpoint
from megarewarm.checkpoint.weights import OnBytes, Weights, check, expected_shapes
from megarewarm.config.model import ModelConfig
from megarewarm.errors import UserError
from megarewarm.model.optimizer_state import states_of
from megarewarm.model.parameters import cards

_RNG = "rng.cpu"


class _Streaming(DefaultSavePlanner):
    """Plans from tensors without memory and reads each one when it is written."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self._read(write_item.index.fqn)


def export_own(source: OpenedCheckpoint, weights: Weights, config: ModelConfig, folder: Path, on_bytes: OnBytes) -> None:
    """Write ``weights`` as a native checkpoint, with the moments and counters of ``source`` if it has them.

    ``folder`` is the checkpoint itself, to be named in ``start.from``. Raises ``UserError`` if it holds something else or
    can't be written.
    """
    training = source.training
    shapes = expected_shapes(config)

    def read(key: str) -> Tensor:
        if key.startswith("model."):
            return weights.read(key.removeprefix("model.")).float()
        is_rng = key == _RNG
        tensor = torch.empty(
            torch.get_rng_state().shape if is_rng else names[key], dtype=torch.uint8 if is_rng else torch.float32
        )
        source.load_tensors({key: tensor})
        on_bytes(tensor.nbytes)
        return tensor

    check(weights, shapes)
    names = {f"model.{name}": shape for name, shape in shapes.items()}
    if training is not None:
        trained = training.trained
        for name, card in cards(config).items():
            rows = None if trained is None else trained.get(name)
            shape = card.shape if rows is None else (rows[1] - rows[0], *card.shape[1:])
            if trained is None or name in trained:
                names |= {f"optimizer.{what}.{name}": shape for what in states_of(training.optimizer, card)}
    described: dict[str, Tensor] = {name: torch.empty(shape, device="meta") for name, shape in names.items()}
    if "rng" in source.keeps:
        described[_RNG] = torch.empty(torch.get_rng_state().shape, dtype=torch.uint8, device="meta")
    state = training.model_copy(update={"keeps": source.keeps}) if training is not None else None
    write_streaming(folder, state or weights_only_state(source.name, config, source.lineage), described, read)


def weights_only_state(name: str, config: ModelConfig, lineage: Lineage) -> TrainingState:
    """Initial counters, for a checkpoint without any."""
    return TrainingState(
        run=name,
        intent="converted",
        step=0,
        tokens=0,
        optimizer_step=0,
        schedule_position=0,
        schedule={},
        last_lr=0.0,
        samples=0,
        data_fingerprint="",
        model=config,
        lineage=lineage,
        start_position=(0, 0, 0),
        keeps=frozenset(),
    )


def write_streaming(folder: Path, state: TrainingState, described: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Write a checkpoint whose tensors are read one after another. ``described``: the same on the meta device. Raises
    ``UserError`` as ``export_own``."""
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or is_checkpoint(folder))):
        raise UserError(f"{folder}: exists and is no checkpoint of megarewarm: choose another folder or remove it")
    try:
        store.write(folder, state, described, planner=_Streaming(read), file_per_tensor=True)
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error}); make room or correct the permissions") from error
