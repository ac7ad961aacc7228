"""The checkpoint a run starts from, whatever its format: what it holds, and how to load each part."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from megarewarm.checkpoint import huggingface, state
from megarewarm.checkpoint.lineage import Lineage, Stage
from megarewarm.checkpoint.state import Tensors, TrainingState
from megarewarm.config.schema import ModelConfig
from megarewarm.errors import UserError
from megarewarm.model.neox import NeoX
from megarewarm.parallel.engine import ParallelModel


class CheckpointSource(Protocol):
    """``training`` is None where the format holds weights only; then there is nothing but weights to keep."""

    name: str
    format: str
    model_config: ModelConfig
    notes: list[str]
    training: TrainingState | None
    lineage: Lineage

    def load_weights(self, model: ParallelModel) -> None:
        """Fill this rank's part of the parameters. All ranks call it."""

    def load_tensors(self, tensors: Tensors) -> None:
        """Fill named training tensors (moments, RNG state) in place."""


class OwnCheckpoint:
    """A checkpoint of ours: weights, moments and every counter."""

    format = "megarewarm"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = str(folder)
        self.training: TrainingState | None = state.read_state(folder)
        self.model_config = self.training.model
        self.lineage = self.training.lineage
        self.notes: list[str] = []

    def load_weights(self, model: ParallelModel) -> None:
        self.load_tensors(weight_tensors(model))

    def load_tensors(self, tensors: Tensors) -> None:
        state.load(self.folder, tensors)

    def whole_model(self) -> NeoX:
        """The model on one device (the CPU), whatever layout wrote it. For one rank to call."""
        with torch.device("meta"):
            model = NeoX(self.model_config)
        model.to_empty(device="cpu")
        state.load(self.folder, {f"model.{name}": p.data for name, p in model.named_parameters()}, alone=True)
        return model


class HuggingFaceCheckpoint:
    """A folder or hub name that transformers loads: weights only."""

    format = "huggingface"
    training: TrainingState | None = None

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        self.name = name
        self.model_config, self.notes = huggingface.read_model_config(folder)
        self.lineage = Lineage(stages=[Stage(run=name, intent="foreign checkpoint (huggingface)")])

    def load_weights(self, model: ParallelModel) -> None:
        huggingface.fill_weights(self.folder, model.shapes, model.fill)

    def load_tensors(self, tensors: Tensors) -> None:
        raise UserError(f"{self.name}: a Hugging Face folder holds weights only; set start.moments to 'reset'")


def weight_tensors(model: ParallelModel) -> Tensors:
    """The parameters on this rank under the names they have in a checkpoint."""
    return {f"model.{name}": tensor for name, tensor in model.weights().items()}


def open_checkpoint(name: str) -> CheckpointSource:
    """The checkpoint ``name`` means: a run or checkpoint folder of ours, a Hugging Face folder, or a hub name.

    Reads headers only. Raises ``UserError`` for a folder that is neither, and for a hub name that can't be had.
    """
    path = Path(name)
    if path.is_dir():
        own = state.locate(path)
        if own is not None:
            return OwnCheckpoint(own)
        if (path / "config.json").is_file():
            return HuggingFaceCheckpoint(name, path)
        raise UserError(
            f"start.from: {name} is neither a run or checkpoint folder of megarewarm (no finished step_N in it) nor a "
            f"Hugging Face folder (no config.json)"
        )
    if path.exists():
        raise UserError(f"start.from: {name} is a file; name the folder of the checkpoint")
    return HuggingFaceCheckpoint(name, huggingface.resolve(name))
