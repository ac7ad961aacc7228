"""A run in progress: everything that trains, and what of it a checkpoint keeps."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megarewarm.checkpoint.lineage import Lineage, Stage
from megarewarm.checkpoint.own.state import RecentSteps, TrainingState
from megarewarm.checkpoint.own.store import Tensors
from megarewarm.checkpoint.source import OwnCheckpoint, weight_tensors
from megarewarm.data.mixture.batches import TrainingBatches
from megarewarm.data.mixture.moving import MovingWindows
from megarewarm.data.mixture.prefetch import Prefetch
from megarewarm.data.mixture.validation import ValidationWindows
from megarewarm.model.fused import Operations
from megarewarm.model.size import count_parameters, peak_tflops, training_flops_per_token
from megarewarm.optimizers.optimizer import Optimizer
from megarewarm.parallel.agreement import Between, all_reduce_sums, nothing_between
from megarewarm.parallel.engine import ParallelModel
from megarewarm.parallel.loss_scaler import LossScaler
from megarewarm.parallel.mesh import Mesh
from megarewarm.parallel.ranks import Ranks
from megarewarm.rewarm.reset import ResetLine
from megarewarm.training.spikes import SpikeDetector
from megarewarm.training.start.plan import Plan
from megarewarm.training.start.run_data import data_seen
from megarewarm.training.start.texts import Texts
from megarewarm.training.start.weights import StartWeights

RNG = "rng.cpu"

Batch = tuple[int, npt.NDArray[np.int64]]
"""Number of the global batch's first sample, and this rank's rows of it, (B / data-parallel ranks, s + 1)."""


@dataclass
class Run:
    """A run in progress. ``step``, ``last_lr``, ``max_lr``, the losses and ``waited`` move with it, the rest stays.

    ``losses`` are the newest validation losses, ``measured`` those of this very step; ``waited``: seconds that training has
    waited for data; ``distilled``: the teacher's term of the newest step, a mean per target. ``start_weights``: what the run
    began with, where something has a use for it. ``spikes``: None where none are looked for; ``unchanged``: how many of the
    last steps in a row changed nothing; ``due``: a save was to be made and waits for a step that did; ``unevaluated``: the
    evaluation after the newest step is yet to be made; ``left_out``: ranges of steps that are not in the weights.
    ``between``: what is asked between two micro-batches of a step.
    """

    plan: Plan
    ranks: Ranks
    mesh: Mesh
    model: ParallelModel
    optimizer: Optimizer
    data: TrainingBatches
    batches: Prefetch[Batch]
    validation: list[ValidationWindows | MovingWindows]
    precision: str
    operations: Operations
    scaler: LossScaler | None
    table_rows: list[ResetLine]
    notes: list[str]
    history: Lineage
    texts: Texts
    step: int
    start_weights: StartWeights | None = None
    last_lr: float = 0.0
    max_lr: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    start_losses: dict[str, float] = field(default_factory=dict)
    waited: float = 0.0
    distilled: float = 0.0
    spikes: SpikeDetector | None = None
    unchanged: int = 0
    due: bool = False
    unevaluated: bool = False
    left_out: list[tuple[int, int]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    between: Between = nothing_between

    def tensors(self) -> Tensors:
        """Everything of the run that is a tensor, by its name in a checkpoint."""
        return weight_tensors(self.model) | moment_tensors(self.model, self.optimizer) | {RNG: torch.get_rng_state()}

    def is_finite(self) -> bool:
        """Whether all weights and moments are, on every rank. All ranks call it."""
        held = (*self.model.parameters.values(), *self.optimizer.state().values())
        wrong = not all(bool(torch.isfinite(values).all()) for values in held)
        return sum(all_reduce_sums([wrong])) == 0

    def stage(self) -> Stage:
        """This run's line in the lineage, as it stands now."""
        plan = self.plan
        count = plan.samples(self.step) - plan.samples(plan.origin.step)
        return Stage(
            run=plan.config.name,
            intent=plan.policy.intent if not plan.resumed else self._own_state().intent,
            started_from=plan.config.start.from_,
            steps=self.step - plan.origin.step,
            tokens=count * plan.config.data.sequence_length,
            schedule=plan.schedule.spec(),
            max_lr=self.max_lr,
            last_lr=self.last_lr,
            data=data_seen(plan, self.data, self.step, self.left_out),
            losses=self.losses,
            left_out=self.left_out,
            tokenizers=self.texts.tokenizers,
            eod=self.texts.eod,
            goes_on=plan.goes_on,
        )

    def _own_state(self) -> TrainingState:
        assert self.plan.source is not None and self.plan.source.training is not None
        return self.plan.source.training

    def state(self, *, interim: bool = False) -> TrainingState:
        """Everything of the run that is a counter, as it stands now. ``interim``: it is saved only because the run stops."""
        plan = self.plan
        stage = self.stage()
        return TrainingState(
            run=plan.config.name,
            intent=stage.intent,
            step=self.step,
            tokens=stage.tokens,
            optimizer_step=self.optimizer.completed_steps,
            schedule_position=plan.schedule_position(self.step),
            schedule=plan.schedule.spec(),
            last_lr=self.last_lr,
            samples=plan.samples(self.step),
            data_fingerprint=self.data.fingerprint(before=plan.samples(self.step)),
            model=plan.model,
            lineage=self.history.extended(stage),
            start_position=(plan.origin.step, plan.origin.schedule, plan.origin.samples),
            start_losses=self.start_losses,
            measured=self.measured,
            loss_scale=self.scaler.state() if self.scaler is not None else None,
            recent=RecentSteps(
                **(self.spikes.state() if self.spikes is not None else {}),
                unchanged=self.unchanged,
                due=self.due,
                unevaluated=self.unevaluated,
            ),
            interim=interim,
            step_tokens=plan.tokens(self.step),
            optimizer=plan.config.optimizer.kind,
            held_out={windows.name: windows.files for windows in self.validation},
        )

    def utilisation(self, tokens_per_second: float) -> dict[str, float]:
        """``{"mfu": share}`` where the device's peak is known (causal-attention FLOPs of forward and backward), else {}."""
        device = self.ranks.device
        if device.type != "cuda":
            return {}
        peak = peak_tflops(torch.cuda.get_device_name(device))
        if peak is None:
            return {}
        config = self.plan.config
        flops = training_flops_per_token(self.plan.model, config.data.sequence_length) * tokens_per_second
        return {"mfu": round(flops / (peak * 1e12 * self.ranks.world_size), 4)}

    def description(self) -> dict[str, Any]:
        """The values of the ``start`` event in metrics.jsonl."""
        config = self.plan.config
        return {
            "name": config.name,
            "folder": config.run_folder,
            "from": config.start.from_,
            "intent": self.plan.policy.intent,
            "step": self.plan.position.step,
            "total_steps": config.total_steps,
            "tokens_per_step": config.tokens_per_step,
            "parameters": count_parameters(self.plan.model),
            "schedule": self.plan.schedule.spec(),
            "notes": self.notes,
            "reset": [vars(row) for row in self.table_rows],
            "precision": self.precision,
            "ranks": self.ranks.world_size,
            "layout": str(self.mesh.layout),
            "device": str(self.ranks.device),
            "kernels": {
                **asdict(self.operations),
                "compile": config.kernels.use == "compile",
                "optimizer": self.optimizer.kind,
            },
        }


def moment_tensors(model: ParallelModel, optimizer: Optimizer) -> Tensors:
    """What the optimizer keeps, under the names they have in a checkpoint; writing to them changes the optimizer's state."""
    return {f"optimizer.{what}.{name}": model.whole(name, tensor) for (what, name), tensor in optimizer.state().items()}


def take_back(run: Run, source: OwnCheckpoint) -> None:
    """Weights, moments, random numbers and loss scale of ``source``, an earlier checkpoint of the run. All ranks call it."""
    assert source.training is not None
    source.load_weights(run.model)
    rng = torch.get_rng_state()
    source.load_tensors(moment_tensors(run.model, run.optimizer) | {RNG: rng})
    torch.set_rng_state(rng)
    run.optimizer.set_completed_steps(source.training.optimizer_step)
    if run.scaler is not None and source.training.loss_scale is not None:
        run.scaler.restore(source.training.loss_scale)
