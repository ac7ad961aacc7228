"""From a plan to everything that trains: model, weights, optimizer, each loaded or reset as the plan prescribes, then
verified."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import torch

from megarewarm.data.mixture.batches import TrainingBatches
from megarewarm.data.mixture.prefetch import Prefetch
from megarewarm.errors import UserError
from megarewarm.optimizers.optimizer import Optimizer
from megarewarm.parallel.agreement import all_reduce_maxima, all_reduce_sums, gather, on_all_ranks
from megarewarm.parallel.collective import collective
from megarewarm.parallel.distillation import Teacher, identity_of
from megarewarm.parallel.engine import ParallelModel
from megarewarm.parallel.graph import MicroBatchGraph
from megarewarm.parallel.laid_out import DTYPES
from megarewarm.parallel.loss_scaler import LossScaler
from megarewarm.parallel.mesh import Mesh
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.run import RNG, Batch, Run, moment_tensors
from megarewarm.training.spikes import SpikeDetector
from megarewarm.training.start.averaging import Average, averaging, begun
from megarewarm.training.start.inputs import Inputs, open_inputs
from megarewarm.training.start.memory import free_memory
from megarewarm.training.start.micro_batch import confirmed, settle_micro_batch
from megarewarm.training.start.plan import Plan
from megarewarm.training.start.weights import StartWeights, copy_weights, keeps_start, reload_start_weights
from megarewarm.training.state import RunState
from megarewarm.training.thaw import optimizer_of


@collective
def build(plan: Plan, ranks: Ranks) -> Run:
    """Build the run. All ranks call it. Files are opened and checked before a model is made; nothing is written. Raises
    ``UserError``."""
    _check_agreement(plan, ranks)
    chosen: list[str] = []
    if is_auto := plan.config.training.micro_batch == "auto":
        free = -all_reduce_maxima([-free_memory(ranks.device, ranks.world_size)])[0]
        plan, chosen = settle_micro_batch(plan, ranks.world_size, ranks.device, free)
    inputs = open_inputs(plan, ranks.world_size, ranks.device)
    mesh, model = _make_model(plan, ranks, inputs)
    _fill_teacher(plan, model.teacher, inputs)
    start_weights, lost = _load_weights(plan, model)
    optimizer, scaler = _make_optimizer(plan, model, inputs)
    if is_auto and ranks.device.type == "cuda" and not plan.resumed:
        plan, smaller = confirmed(model, plan)
        chosen = smaller or chosen
    if inputs.graph:
        shape = model.micro_batch, plan.config.data.sequence_length + 1
        model.graph = MicroBatchGraph(lambda rows, scale: model.differentiate(rows, scale, None)[0], shape, ranks.device)
    state, spikes = _make_state(plan)
    # loading may have added to the source's notes
    notes = list(dict.fromkeys([*chosen, *inputs.notes, *(plan.source.notes if plan.source else []), *lost]))
    batches = Prefetch(_batches(plan, inputs.data, mesh))
    average = _load_average(plan, model)
    run = Run(
        plan, ranks, inputs, mesh, model, optimizer, scaler, batches, spikes, state, start_weights, notes, average=average
    )
    _assert_applied(run)
    return run


def _check_agreement(plan: Plan, ranks: Ranks) -> None:
    total = all_reduce_sums([float(plan.position.step)])[0]
    if total != ranks.world_size * plan.position.step:
        raise UserError(
            f"{plan.config.run_folder}: the ranks see different checkpoints (rank {ranks.rank} is at step "
            f"{plan.position.step}); the run folder must lie on a file system that all hosts share"
        )


def _make_model(plan: Plan, ranks: Ranks, inputs: Inputs) -> tuple[Mesh, ParallelModel]:
    """The layout of the ranks, and the model laid out over them, its parameters still empty."""
    config = plan.config
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
        precision=inputs.precision,
        documents=inputs.documents,
        teacher=_make_teacher(plan, mesh, inputs),
    )
    return mesh, model


def _make_teacher(plan: Plan, mesh: Mesh, inputs: Inputs) -> Teacher | None:
    """The teacher laid out over the ranks, its parameters still empty; None without one."""
    config, taught_by = plan.config, plan.taught_by
    if config.distill is None or taught_by is None or inputs.teacher is None:
        return None
    return Teacher(
        config.distill,
        taught_by,
        plan.model.vocab_size,
        mesh,
        parallel=config.parallel,
        sequence_length=config.data.sequence_length,
        micro_batch=config.training.micro_batch_size,
        dtype=DTYPES[inputs.precision],
    )


@collective
def _fill_teacher(plan: Plan, teacher: Teacher | None, inputs: Inputs) -> None:
    """Load the teacher's weights. All ranks call it. Raises ``UserError`` if a resumed run had another teacher before."""
    if teacher is None:
        return
    source, names = inputs.teacher, teacher.names
    assert source is not None

    def read() -> None:
        for name in names:
            teacher.fill(name, source.weights.read(name))

    on_all_ranks(read, UserError)
    teacher.identity = identity_of({name: sample for each in gather(teacher.samples) for name, sample in each.items()})
    before = plan.source.lineage.stages[-1].taught_by if plan.resumed and plan.source is not None else None
    if before is not None and before.identity != teacher.identity:
        raise UserError(
            f"distill{'.from' if plan.needs_teacher else ''}: {source.name} holds other weights than those that have taught "
            f"{plan.config.name} so far; restore them, or begin another run"
        )


def _choose_algorithms(deterministic: bool) -> None:
    """Choose PyTorch's deterministic operations, or its fastest; an operation without a deterministic form raises."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads memory before it is written
    torch.use_deterministic_algorithms(deterministic)
    # products of bf16 are summed in fp32 to their end: a weight's gradient sums over all tokens, in parts
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def _load_weights(plan: Plan, model: ParallelModel) -> tuple[StartWeights | None, list[str]]:
    """Fill ``model``; returns the run's first weights, if something uses them, and notes."""
    start: StartWeights | None = None
    lost: list[str] = []
    if plan.resumed and keeps_start(plan.config):
        start, lost = reload_start_weights(plan, model)
    if plan.policy.weights == "load":
        assert plan.source is not None
        plan.source.load_weights(model)
    else:
        model.initialize(plan.config.training.seed)
    if not plan.resumed and keeps_start(plan.config):
        start = copy_weights(model)
    return start, lost


def _make_optimizer(plan: Plan, model: ParallelModel, inputs: Inputs) -> tuple[Optimizer, LossScaler | None]:
    """The optimizer and the loss scale. Applies the reset table: kept state is loaded, the rest is zero."""
    optimizer = optimizer_of(model, plan.config.optimizer, inputs.optimizer, plan.trains, plan.thawed)
    tensors = {name: t for name, t in moment_tensors(model, optimizer).items() if _is_kept(plan, name.split(".")[1])}
    rng = torch.get_rng_state()
    if plan.policy.rng == "keep":
        tensors[RNG] = rng
    if tensors:
        assert plan.source is not None
        plan.source.load_tensors(tensors)
    if plan.policy.rng == "keep":
        torch.set_rng_state(rng)
    optimizer.set_completed_steps(plan.position.optimizer_step - plan.measured_batches)  # these are yet to be measured
    optimizer.set_lr(plan.schedule.lr(plan.position.schedule))
    scaler = LossScaler(plan.config.training.loss_scale) if inputs.precision == "fp16" else None
    stored = plan.source.training.loss_scale if plan.source is not None and plan.source.training is not None else None
    if scaler is not None and stored is not None and plan.policy.loss_scale == "keep":
        scaler.restore(stored)
    return optimizer, scaler


def _load_average(plan: Plan, model: ParallelModel) -> Average | None:
    """The average of the run's last weights, as far as its checkpoint has it; None without one."""
    if (of := averaging(plan.config, plan.origin.step)) is None:
        return None
    average = Average(of, model)
    if begun(plan):
        assert plan.source is not None
        average.allocate()
        plan.source.load_tensors(average.tensors())
    return average


def _is_kept(plan: Plan, state: str) -> bool:
    return plan.policy.moments == "keep" or (plan.policy.moments == "keep_second" and state == "exp_avg_sq")


def _make_state(plan: Plan) -> tuple[RunState, SpikeDetector | None]:
    """The state that changes with the steps: as saved, or initial."""
    watched = plan.config.reliability
    spikes = None if watched.spikes == "off" else SpikeDetector(watched.spike_window, watched.spike_deviations)
    if not plan.resumed:
        return RunState(plan.position.step), spikes
    assert plan.source is not None and plan.source.training is not None
    if spikes is not None:
        recent = plan.source.training.recent_steps
        spikes.restore(recent.losses, recent.norms)
    return RunState.of_checkpoint(plan.source.training), spikes


def _batches(plan: Plan, data: TrainingBatches, mesh: Mesh) -> Iterator[Batch]:
    size = plan.config.training.global_batch
    for first in range(plan.position.samples, plan.samples(plan.config.total_steps), size):
        yield first, data.share(first, size, mesh.data_rank, mesh.layout.data)


def _assert_applied(run: Run) -> None:
    """Verify the reset table on the objects that training uses, not on the plan."""
    plan = run.plan
    first_lr = plan.schedule.lr(plan.position.schedule)
    checks = {
        "every parameter group has the schedule's first learning rate": np.allclose(
            run.optimizer.lrs, first_lr, rtol=1e-9, atol=0
        ),
        "Adam's step count": run.optimizer.completed_steps == plan.position.optimizer_step - plan.measured_batches,
        "reset moments are zero": not any(
            bool(t.any()) for (what, _), t in run.optimizer.state().items() if not _is_kept(plan, what)
        ),
        "frozen parameters have no gradients": all(
            p.requires_grad == (name in run.model.trained) for name, p in run.model.parameters.items()
        ),
        "the model counts positions as planned": run.model.config == plan.model,
        "weights are fp32 masters": all(p.dtype == torch.float32 for p in run.model.parameters.values()),
        "position in the data": plan.position.samples == plan.samples(plan.position.step),
    }
    for what, holds in checks.items():
        if not holds:
            raise AssertionError(f"the reset table was not applied: {what} is wrong; please report this")
