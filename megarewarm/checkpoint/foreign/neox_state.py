"""The counters of a GPT-NeoX checkpoint under megarewarm's names, and its weights in full precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megarewarm.checkpoint.foreign.neox_folder import NeoXFolder, step_of
from megarewarm.checkpoint.foreign.neox_optimizer import NeoXOptimizer
from megarewarm.checkpoint.foreign.pickles import InertRecord
from megarewarm.checkpoint.lineage import Lineage, Stage
from megarewarm.checkpoint.own.state import TrainingState
from megarewarm.checkpoint.weights import Description, Weights
from megarewarm.errors import UserError


class _Masters:
    """The weights of ``folder``, each from the optimizer's fp32 masters."""

    def __init__(self, folder: NeoXFolder, optimizer: NeoXOptimizer) -> None:
        self.where = folder.where
        self._folder, self._optimizer = folder, optimizer

    def describe(self) -> Mapping[str, Description]:
        found = self._folder.describe()
        return {name: Description(item.shape, torch.float32, f"the master of {item.place}") for name, item in found.items()}

    def read(self, name: str) -> Tensor:
        return self._optimizer.read("master", name)


def with_masters(folder: NeoXFolder, optimizer: NeoXOptimizer) -> Weights:
    """The folder's weights in fp32: the masters where the optimizer's files hold them, else the stored weights."""
    return _Masters(folder, optimizer) if optimizer.has_masters else folder


def read_training(folder: NeoXFolder) -> tuple[TrainingState | None, NeoXOptimizer | None, list[str]]:
    """The counters and the optimizer of ``folder``, and notes; None for both if there is no optimizer state to read."""
    has_files = any(file.name.endswith("optim_states.pt") for file in folder.folder.iterdir())
    stored = folder.state.get("optimizer")
    if not has_files and not (isinstance(stored, Mapping) and stored):
        universal = "; its optimizer is in DeepSpeed's universal form, which is not read" * (folder.folder / "zero").is_dir()
        return None, None, [f"weights only: there are no optimizer files in it{universal}"]
    optimizer = NeoXOptimizer(folder)
    saved = folder.state
    iteration = next((saved[key] for key in ("iteration", "total_iters", "global_steps") if saved.get(key) is not None), None)
    if iteration is None:
        iteration = step_of(folder.folder)
    if iteration is None:
        raise UserError(f"{folder.where}: nothing in it says at which iteration it was saved ('iteration' in mp_rank_00)")
    skipped = int(saved.get("skipped_steps") or 0)
    steps = optimizer.completed_steps
    samples = saved.get("global_samples")
    if samples is None:
        samples = int(iteration) * int(folder.setting("train_batch_size", 0) or 0)
    schedule = _schedule(saved.get("lr_scheduler"))
    position = int(schedule.pop("num_iters", int(iteration) - skipped))
    scale = optimizer.loss_scale
    notes = ["the position in the data is GPT-NeoX's count of samples; that the files are the same can't be checked"]
    if optimizer.has_masters:
        notes.append("weights are taken from the optimizer's fp32 masters")
    length = int(folder.setting("seq_length", folder.model_config.max_positions))
    tokens = int(samples) * length
    stage = Stage(
        run=folder.where,
        intent="foreign checkpoint (gpt-neox)",
        steps=int(iteration),
        tokens=tokens,
        schedule=schedule,
        max_lr=schedule.get("max_lr"),
        optimizer="adamw",  # the only one whose moments are read
    )
    state = TrainingState(
        run=folder.folder.name,
        intent="foreign",
        step=int(iteration),
        tokens=tokens,
        optimizer_step=steps if steps is not None else int(iteration) - skipped,
        schedule_position=position,
        schedule=schedule,
        last_lr=0.0,
        samples=int(samples),
        data_fingerprint="",
        model=folder.model_config,
        lineage=Lineage(stages=[stage]),
        start_position=(0, 0, 0),
        loss_scale={"scale": scale, "finite_steps": 0} if scale is not None else None,
    )
    return state, optimizer, notes


def _schedule(saved: Any) -> dict[str, Any]:
    """GPT-NeoX's stored AnnealingLR, under megarewarm's names where the meaning is the same."""
    if isinstance(saved, InertRecord):
        saved = saved.values
    if not isinstance(saved, Mapping):
        return {"curve": "not recorded"}
    names = {"decay_style": "curve", "start_lr": "max_lr", "min_lr": "min_lr", "num_iters": "num_iters"}
    return {ours: saved[theirs] for theirs, ours in names.items() if theirs in saved}
