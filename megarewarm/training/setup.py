"""From a plan to everything that trains: model, data, optimizer, each loaded or reset as the plan says, then checked."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import torch

from megarewarm.checkpoint.own.state import RecentSteps
from megarewarm.data.mixture.batches import TrainingBatches
from megarewarm.data.mixture.prefetch import Prefetch
from megarewarm.errors import UserError
from megarewarm.model.size import count_parameters
from megarewarm.optimizers.optimizer import Optimizer, make_optimizer
from megarewarm.parallel.agreement import all_reduce_sums
from megarewarm.parallel.distillation import Teacher
from megarewarm.parallel.engine import DTYPES, ParallelModel
from megarewarm.parallel.loss_scaler import LossScaler
from megarewarm.parallel.mesh import Mesh
from megarewarm.parallel.ranks import Ranks
from megarewarm.rewarm.reset import table
from megarewarm.training.run import RNG, Batch, Run, moment_tensors
from megarewarm.training.spikes import SpikeDetector
from megarewarm.training.start.inputs import open_inputs
from megarewarm.training.start.plan import Plan, settle_model
from megarewarm.training.start.weights import StartWeights, again, copy_weights, keeps_start


def build(plan: Plan, ranks: Ranks) -> Run:
    """Build the run. Files are opened and checked before a model is made. Raises ``UserError``; writes nothing."""
    config = plan.config
    _check_agreement(plan, ranks)
    inputs = open_inputs(plan, ranks.world_size, ranks.device)
    data, precision = inputs.data, inputs.precision

    torch.manual_seed(config.training.seed + ranks.rank)
    _choose_algorithms(config.kernels.deterministic)
    mesh = Mesh(ranks, inputs.layout)
    model = ParallelModel(
        plan.model,
        mesh,
        parallel=config.parallel,
        training=config.training,
        operations=inputs.operations,
        compile_layers=config.kernels.use == "compile",
        loss_memory=config.kernels.logit_bytes(ranks.device.type),
        sequence_length=config.data.sequence_length,
        precision=precision,
        documents=inputs.documents,
    )
    begun: StartWeights | None = None
    lost: list[str] = []
    if plan.resumed and keeps_start(config):
        begun, lost = again(plan, model)
    if plan.policy.weights == "load":
        assert plan.source is not None
        plan.source.load_weights(model)
    else:
        model.initialize(config.training.seed)
    if not plan.resumed and keeps_start(config):
        begun = copy_weights(model)
    if config.distill is not None:
        assert inputs.teacher is not None
        taught = settle_model(config, inputs.teacher).model
        assert taught is not None
        model.teacher = Teacher(config.distill, taught, inputs.teacher.weights.read, ranks.device, DTYPES[precision])
    optimizer = make_optimizer(model, config.optimizer, inputs.optimizer)
    _apply(plan, model, optimizer)

    watched = config.reliability
    scaler = LossScaler(config.training.loss_scale) if precision == "fp16" else None
    stored = plan.source.training.loss_scale if plan.source is not None and plan.source.training is not None else None
    if scaler is not None and stored is not None and plan.policy.loss_scale == "keep":
        scaler.restore(stored)

    run = Run(
        plan=plan,
        ranks=ranks,
        mesh=mesh,
        model=model,
        optimizer=optimizer,
        data=data,
        batches=Prefetch(_batches(plan, data, mesh)),
        validation=inputs.validation,
        precision=precision,
        scaler=scaler,
        table_rows=table(
            plan.policy,
            plan.source,
            plan.schedule,
            plan.position,
            count_parameters(plan.model),
            config.training.seed,
            scaler.scale if scaler is not None else None,
        ),
        operations=inputs.operations,
        # loading may have added to the source's
        notes=list(dict.fromkeys([*inputs.notes, *(plan.source.notes if plan.source else []), *lost])),
        history=plan.history,
        texts=inputs.texts,
        step=plan.position.step,
        start_weights=begun,
        spikes=None if watched.spikes == "off" else SpikeDetector(watched.spike_window, watched.spike_deviations),
    )
    if plan.resumed:
        assert plan.source is not None and plan.source.training is not None
        stage = plan.source.training.lineage.stages[-1]
        run.losses, run.start_losses = dict(stage.losses), dict(plan.source.training.start_losses)
        run.last_lr, run.max_lr = stage.last_lr or 0.0, stage.max_lr or 0.0
        run.left_out = list(stage.left_out)
        recent = plan.source.training.recent or RecentSteps()
        run.unchanged, run.due, run.unevaluated = recent.unchanged, recent.due, recent.unevaluated
        if run.spikes is not None:
            run.spikes.restore(recent.losses, recent.norms)
    _assert_applied(run)
    return run


def _batches(plan: Plan, data: TrainingBatches, mesh: Mesh) -> Iterator[Batch]:
    size = plan.config.training.global_batch
    for first in range(plan.position.samples, plan.samples(plan.config.total_steps), size):
        yield first, data.share(first, size, mesh.data_rank, mesh.layout.data)


def _check_agreement(plan: Plan, ranks: Ranks) -> None:
    total = all_reduce_sums([float(plan.position.step)])[0]
    if total != ranks.world_size * plan.position.step:
        raise UserError(
            f"{plan.config.run_folder}: the ranks see different checkpoints (rank {ranks.rank} stands at step "
            f"{plan.position.step}); the run folder must lie on a file system that all hosts share"
        )


def _choose_algorithms(deterministic: bool) -> None:
    """PyTorch's own operations with the same bits at every run, or its fastest; an operation that has no such form raises."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is computed
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads memory before it is written
    torch.use_deterministic_algorithms(deterministic)


def _apply(plan: Plan, model: ParallelModel, optimizer: Optimizer) -> None:
    """The reset table, last: what is kept is loaded, what is not is zero."""
    tensors = {name: t for name, t in moment_tensors(model, optimizer).items() if _is_kept(plan, name.split(".")[1])}
    rng = torch.get_rng_state()
    if plan.policy.rng == "keep":
        tensors[RNG] = rng
    if tensors:
        assert plan.source is not None
        plan.source.load_tensors(tensors)
    if plan.policy.rng == "keep":
        torch.set_rng_state(rng)
    optimizer.set_completed_steps(plan.position.optimizer_step)
    optimizer.set_lr(plan.schedule.lr(plan.position.schedule))


def _is_kept(plan: Plan, state: str) -> bool:
    return plan.policy.moments == "keep" or (plan.policy.moments == "keep_second" and state == "exp_avg_sq")


def _assert_applied(run: Run) -> None:
    """The run stands where the table says, seen from the objects that will be used, not from the plan."""
    plan = run.plan
    first_lr = plan.schedule.lr(plan.position.schedule)
    checks = {
        "every parameter group has the schedule's first learning rate": np.allclose(
            run.optimizer.lrs, first_lr, rtol=1e-9, atol=0
        ),
        "Adam's step count": run.optimizer.completed_steps == plan.position.optimizer_step,
        "reset moments are zero": not any(
            bool(t.any()) for (what, _), t in run.optimizer.state().items() if not _is_kept(plan, what)
        ),
        "weights are fp32 masters": all(p.dtype == torch.float32 for p in run.model.parameters.values()),
        "position in the data": plan.position.samples == plan.samples(plan.position.step),
    }
    for what, holds in checks.items():
        if not holds:
            raise AssertionError(f"the reset table was not applied: {what} is wrong; please report this")
