"""Our own checkpoints: tensors by torch.distributed.checkpoint, everything else in one readable ``state.json``.

A checkpoint is a folder ``step_N`` that appears by a rename once it is whole, so a kill in the middle of a save leaves
the previous one as the newest. Tensors are stored by the model's parameter names and know nothing of ranks.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from megarewarm.checkpoint.lineage import Lineage
from megarewarm.config.schema import ModelConfig
from megarewarm.errors import UserError

FORMAT = 1
STATE_FILE = "state.json"
_STEP = re.compile(r"step_(\d+)$")

Tensors = dict[str, Tensor]


class TrainingState(BaseModel):
    """Every counter of a run that is not a tensor.

    ``step``: completed optimizer steps of the run. ``optimizer_step``: Adam's count. ``schedule_position``: where the
    schedule stands, counted in its own steps. ``samples``: consumed samples of the data identified by
    ``data_fingerprint``. ``schedule``: the whole curve. ``start_position``: (step, schedule position, samples) at which the
    run began, so that a resumed run continues all three.
    """

    model_config = ConfigDict(frozen=True)

    format: int = FORMAT
    run: str
    intent: str
    step: int
    tokens: int
    optimizer_step: int
    schedule_position: int
    schedule: dict[str, Any]
    last_lr: float
    samples: int
    data_fingerprint: str
    model: ModelConfig
    lineage: Lineage
    start_position: tuple[int, int, int]
    start_losses: dict[str, float] = {}
    loss_scale: dict[str, float] | None = None


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the whole checkpoints in ``RUN/checkpoints``, oldest first."""
    found = []
    if folder.is_dir():
        for entry in folder.iterdir():
            match = _STEP.match(entry.name)
            if match and (entry / STATE_FILE).is_file():
                found.append((int(match[1]), entry))
    return sorted(found)


def locate(path: Path) -> Path | None:
    """The checkpoint that ``path`` means: itself, or the newest one of a run folder; None where there is none of ours."""
    if (path / STATE_FILE).is_file():
        return path
    for folder in (path, path / "checkpoints"):
        if found := checkpoints_in(folder):
            return found[-1][1]
    return None


def read_state(checkpoint: Path) -> TrainingState:
    """The counters of a checkpoint. Raises ``UserError`` for a file that is damaged or of a newer format."""
    path = checkpoint / STATE_FILE
    try:
        state = TrainingState.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable checkpoint ({first}); remove {checkpoint} to use an older one") from error
    if state.format > FORMAT:
        raise UserError(f"{path}: format {state.format} is newer than this megarewarm reads ({FORMAT}); update megarewarm")
    return state


@contextmanager
def _quietly_alone() -> Iterator[None]:
    """Without torch's warning that a single process has no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _sync_tree(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(folder: Path, state: TrainingState, tensors: Tensors, *, keep_last: int) -> Path:
    """Write ``folder/step_N``; all ranks call it, the main rank names it. Returns the checkpoint's folder.

    ``tensors``: model, moments and RNG by name, equal on all ranks (or DTensors). The newest ``keep_last`` checkpoints
    stay; older ones are removed only after the new one stands. Raises ``UserError`` when the disk refuses.
    """
    several = dist.is_initialized() and dist.get_world_size() > 1
    main = not several or dist.get_rank() == 0
    final = folder / f"step_{state.step}"
    partial = folder / f"{final.name}.partial"
    try:
        if main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("step_*.partial"):
                shutil.rmtree(leftover)
            partial.mkdir()
        if several:
            dist.barrier()
        with _quietly_alone():
            dcp.save(dict(tensors), checkpoint_id=partial, no_dist=not several)
        if main:
            (partial / STATE_FILE).write_text(state.model_dump_json(indent=1) + "\n")
            _sync_tree(partial)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            _sync_folder(folder)
            _remove_old(folder, keep_last)
        if several:
            dist.barrier()
    except OSError as error:
        raise UserError(
            f"{partial}: the checkpoint could not be written ({error}); make room or correct the permissions and run the "
            f"same command again"
        ) from error
    return final


def _remove_old(folder: Path, keep_last: int) -> None:
    for _, old in checkpoints_in(folder)[:-keep_last]:
        # renamed first, so that a kill during the removal leaves nothing that looks like a whole checkpoint
        doomed = old.with_name(f"{old.name}.partial")
        old.rename(doomed)
        shutil.rmtree(doomed)


def load(checkpoint: Path, tensors: Tensors, *, alone: bool = False) -> None:
    """Fill ``tensors`` in place from a checkpoint. Raises ``UserError`` naming a tensor that is missing or misshapen.

    All ranks call it, unless ``alone``.
    """
    several = not alone and dist.is_initialized() and dist.get_world_size() > 1
    stored = stored_shapes(checkpoint)
    for name, tensor in tensors.items():
        if name not in stored:
            raise UserError(f"{checkpoint}: tensor '{name}' is missing; the checkpoint is of another model or damaged")
        if tuple(tensor.shape) != stored[name]:
            raise UserError(
                f"{checkpoint}: tensor '{name}' has shape {stored[name]}, this run's model needs {tuple(tensor.shape)}; "
                f"make 'model' agree with the checkpoint, or leave 'model' out"
            )
    try:
        with _quietly_alone():
            dcp.load(dict(tensors), checkpoint_id=checkpoint, no_dist=not several)
    except (OSError, EOFError, RuntimeError, dcp.CheckpointException) as error:
        first = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise UserError(f"{checkpoint}: can't be read ({first}); remove the folder to use an older checkpoint") from error


def stored_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a checkpoint."""
    try:
        metadata = dcp.FileSystemReader(checkpoint).read_metadata()
    except (OSError, EOFError, ValueError, AttributeError) as error:
        raise UserError(
            f"{checkpoint}: the tensor index is missing or damaged; remove the folder to use an older one"
        ) from error
    shapes = {}
    for name, entry in metadata.state_dict_metadata.items():
        size = getattr(entry, "size", None)
        if isinstance(size, torch.Size):
            shapes[name] = tuple(size)
    return shapes
