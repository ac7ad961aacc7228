"""A run in progress: everything that trains, and its state in a checkpoint."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megarewarm import __version__
from megarewarm.checkpoint.lineage import Stage, TaughtBy
from megarewarm.checkpoint.own.state import RecentSteps, TrainingState
from megarewarm.checkpoint.own.store import Tensors, local
from megarewarm.checkpoint.source import OwnCheckpoint, weight_tensors
from megarewarm.data.mixture.batches import TrainingBatches
from megarewarm.data.mixture.prefetch import Prefetch
from megarewarm.data.mixture.validation import WindowSet
from megarewarm.model.size import count_parameters
from megarewarm.optimizers.optimizer import Optimizer
from megarewarm.optimizers.staggered import parts_of
from megarewarm.parallel.agreement import Between, all_reduce_sums, nothing_between
from megarewarm.parallel.collective import collective
from megarewarm.parallel.engine import ParallelModel
from megarewarm.parallel.loss_scaler import LossScaler
from megarewarm.parallel.mesh import Mesh
from megarewarm.parallel.ranks import Ranks
from megarewarm.rewarm.reset import ResetLine, table
from megarewarm.training.spikes import SpikeDetector
from megarewarm.training.start.averaging import Average
from megarewarm.training.start.inputs import Inputs
from megarewarm.training.start.plan import Plan
from megarewarm.training.start.run_data import data_seen
from megarewarm.training.start.tasks import RunTasks
from megarewarm.training.start.weights import StartWeights
from megarewarm.training.state import RunState
from megarewarm.training.thaw import thaw, thawed

RNG = "rng.cpu"

Batch = tuple[int, npt.NDArray[np.int64]]
"""Number of the global batch's first sample, and this rank's rows of it, (B / data-parallel ranks, s + 1)."""


@dataclass(frozen=True)
class Update:
    """The update that a step is about to make, at learning rate ``lr`` from ``model.gradients`` times ``scale``. ``rows``: this
    rank's of the global batch; ``clip``: the factor of their gradients, which ``scale`` contains beside the loss scale."""

    lr: float
    rows: npt.NDArray[np.int64]
    scale: float
    clip: float


@dataclass
class Run:
    """A run in progress: ``state`` moves with its steps, the rest stays as ``setup.build`` made it.

    ``inputs``: what it reads besides weights. ``notes``: what a user must know before the first step. ``spikes``: None where
    none are looked for. ``start_weights``: what the run began with, where something has a use for it. ``between``: what is
    asked between two micro-batches of a step. ``wants_row_losses``: whether steps return the loss of each sequence, too.
    ``before_update``: called on all ranks before each update, which it must leave as it is. ``average``: of
    ``checkpoint.average``.
    """

    plan: Plan
    ranks: Ranks
    inputs: Inputs
    mesh: Mesh
    model: ParallelModel
    optimizer: Optimizer
    scaler: LossScaler | None
    batches: Prefetch[Batch]
    spikes: SpikeDetector | None
    state: RunState
    start_weights: StartWeights | None
    notes: list[str]
    between: Between = nothing_between
    wants_row_losses: bool = False
    before_update: Callable[[Update], None] | None = None
    average: Average | None = None

    @property
    def step(self) -> int:
        """Completed steps."""
        return self.state.step

    @property
    def data(self) -> TrainingBatches:
        """The training data."""
        return self.inputs.data

    @property
    def validation(self) -> list[WindowSet]:
        """The validation sets."""
        return self.inputs.validation

    def tensors(self) -> Tensors:
        """Everything of the run that is a tensor, by its name in a checkpoint."""
        averaged = self.average.tensors() if self.average is not None else {}
        return weight_tensors(self.model) | moment_tensors(self.model, self.optimizer) | averaged | {RNG: torch.get_rng_state()}

    @property
    def tasks(self) -> RunTasks:
        """The tasks of ``evaluation``."""
        return self.inputs.tasks

    @collective
    def is_finite(self) -> bool:
        """Whether all weights and moments are, on every rank. All ranks call it."""
        held = (*self.model.parameters.values(), *self.optimizer.state().values())
        wrong = not all(bool(torch.isfinite(values).all()) for values in held)
        return sum(all_reduce_sums([wrong])) == 0

    def stage(self) -> Stage:
        """This run's stage of the lineage, up to the present step."""
        plan = self.plan
        count = plan.samples(self.step) - plan.samples(plan.origin.step)
        return Stage(
            run=plan.config.name,
            intent=plan.policy.intent if not plan.resumed else self._own_state().intent,
            started_from=plan.config.start.from_,
            steps=self.step - plan.origin.step,
            tokens=count * plan.config.data.sequence_length,
            schedule=plan.schedule.spec(),
            max_lr=self.state.max_lr,
            last_lr=self.state.last_lr,
            data=data_seen(plan, self.data, self.step, self.state.left_out),
            losses=self.state.losses,
            left_out=self.state.left_out,
            tokenizers=self.inputs.texts.tokenizers,
            eod=self.inputs.texts.eod,
            goes_on=plan.goes_on,
            optimizer=plan.config.optimizer.kind,
            reset=self._own_state().lineage.stages[-1].reset if plan.resumed else plan.policy.lines(),
            taught_by=self._taught_by(),
        )

    def _taught_by(self) -> TaughtBy | None:
        settings, source, teacher = self.plan.config.distill, self.inputs.teacher, self.model.teacher
        if settings is None or source is None or teacher is None:
            return self._own_state().lineage.stages[-1].taught_by if self.plan.resumed else None
        return TaughtBy(name=source.name, kind=settings.kind, weight=settings.weight, identity=teacher.identity)

    def _own_state(self) -> TrainingState:
        assert self.plan.source is not None and self.plan.source.training is not None
        return self.plan.source.training

    def training_state(self, recent: Mapping[str, Any], *, interim: bool = False) -> TrainingState:
        """Everything of the run that is not a tensor, for a checkpoint. ``recent``: state of the parts that follow a step.
        ``interim``: it is saved only because the run stops."""
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
            last_lr=self.state.last_lr,
            samples=plan.samples(self.step),
            data_fingerprint=self.data.fingerprint(before=plan.samples(self.step)),
            model=plan.model,
            lineage=plan.history.extended(stage),
            start_position=(plan.origin.step, plan.origin.schedule, plan.origin.samples),
            start_losses=self.state.start_losses,
            measured=self.state.measured,
            loss_scale=self.scaler.state() if self.scaler is not None else None,
            recent=RecentSteps(**(self.spikes.state() if self.spikes is not None else {}), **recent),
            interim=interim,
            step_tokens=plan.tokens(self.step),
            optimizer=plan.config.optimizer.kind,
            held_out={windows.name: windows.files for windows in self.validation},
            trained=None if self.model.trains is None else dict(self.model.trains),
            thawed=thawed(self.optimizer),
        )

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
            "reset": [vars(row) for row in self.reset_table()],
            "tokenizer": self.inputs.texts.tokenizer,
            "precision": self.inputs.precision,
            "ranks": self.ranks.world_size,
            "layout": str(self.mesh.layout),
            "device": str(self.ranks.device),
            "versions": {"megarewarm": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
            "kernels": {
                **asdict(self.inputs.operations),
                "compile": config.kernels.use == "compile",
                "graph": self.inputs.graph,
                "optimizer": self.optimizer.kind,
            },
        }

    def reset_table(self) -> list[ResetLine]:
        """What the run has kept of its start checkpoint, and what it has reset."""
        plan = self.plan
        scale = self.scaler.scale if self.scaler is not None else None
        parameters, seed = count_parameters(plan.model), plan.config.training.seed
        return table(plan.policy, plan.source, plan.schedule, plan.position, parameters, seed, scale, plan.freezing, plan.model)

    @collective
    def thaw_if_due(self) -> bool:
        """Before a step: let everything train if it is the first that does so. All ranks call it."""
        freezing, before = self.plan.freezing, self.model.trains
        if before is None or freezing is None or freezing.after(self.step + 1) is not None:
            return False
        self.optimizer = thaw(self.model, self.optimizer, self.plan.config.optimizer, before)
        if self.spikes is not None:
            self.spikes.clear()  # the gradient's norm is that of more parameters
        return True

    @collective
    def restore_from(self, source: OwnCheckpoint) -> None:
        """Weights, moments, random numbers and loss scale of an earlier checkpoint of the run. All ranks call it. Moments of
        what was frozen then begin again."""
        assert source.training is not None
        source.load_weights(self.model)
        rng = torch.get_rng_state()
        moments = moment_tensors(self.model, self.optimizer)
        begun = (
            moments
            if self.model.trains == (held := source.training.trained)
            else {
                name: tensor
                for name, tensor in moments.items()
                if held is not None and held.get(name.split(".", 2)[2], ()) is None
            }
        )
        for name in moments.keys() - begun.keys():
            local(moments[name]).zero_()
        source.load_tensors(begun | {RNG: rng})
        torch.set_rng_state(rng)
        self.optimizer.set_completed_steps(source.training.optimizer_step)
        before = {frozenset(part.names): part.optimizer_step for part in source.training.thawed}
        for part in parts_of(self.optimizer)[1]:
            part.optimizer.set_completed_steps(before.get(part.names, 0))
        if self.scaler is not None and source.training.loss_scale is not None:
            self.scaler.restore(source.training.loss_scale)


def moment_tensors(model: ParallelModel, optimizer: Optimizer) -> Tensors:
    """The optimizer's state under the names it has in a checkpoint; writing to the tensors changes it."""
    return {f"optimizer.{what}.{name}": model.whole_trained(name, tensor) for (what, name), tensor in optimizer.state().items()}
