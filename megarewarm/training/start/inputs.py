"""What a run needs besides ranks, memory and weights, opened and checked. A start and a dry run use the same functions, so
that both refuse the same input with the same message."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megarewarm.checkpoint.source import OpenedCheckpoint, OwnCheckpoint
from megarewarm.checkpoint.weights import check, expected_shapes
from megarewarm.config.schema import RunConfig
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.mixture.batches import TrainingBatches
from megarewarm.data.mixture.validation import WindowSet
from megarewarm.errors import UserError
from megarewarm.model.documents import IGNORE, DocumentRules
from megarewarm.model.fused import Operations
from megarewarm.model.operations import choose_operations, choose_optimizer
from megarewarm.model.size import count_parameters
from megarewarm.parallel.collective import collective
from megarewarm.parallel.fit import check_fit
from megarewarm.parallel.graph import choose_graph
from megarewarm.parallel.laid_out import DTYPES, without_copies
from megarewarm.parallel.mesh import Layout, choose_layout
from megarewarm.training.output.metrics import check_loggers
from megarewarm.training.output.run_folder import RunFolder
from megarewarm.training.start.averaging import about_average, check_average
from megarewarm.training.start.plan import Plan, differing_choices, other_optimizer, settle_model
from megarewarm.training.start.planned import PlannedCheckpoint
from megarewarm.training.start.run_data import check_held_out, open_data, open_validation
from megarewarm.training.start.saving import check_roll_back, check_saving
from megarewarm.training.start.tasks import RunTasks, open_tasks
from megarewarm.training.start.text_bytes import TextBytes
from megarewarm.training.start.texts import Texts, settle_texts
from megarewarm.training.start.valuation import check_valuation
from megarewarm.training.start.weights import start_source

_HIGHEST_USUAL = 1e-2  # of peak learning rates
_WORTH_BF16 = 1_000_000  # parameters; the quickstart's model has 1.3M, and its step takes half the time in bf16


@dataclass(frozen=True)
class Inputs:
    """Everything opened and chosen. ``graph``: see ``choose_graph``; ``optimizer``: its kind; ``notes``: for the user;
    ``teacher``: the checkpoint for ``distill``, or None, also where the run has no steps left; ``text_bytes``: of the
    validation sets; ``tasks``: those of ``evaluation``."""

    layout: Layout
    texts: Texts
    data: TrainingBatches
    validation: list[WindowSet]
    documents: DocumentRules | None
    precision: str
    operations: Operations
    graph: bool
    optimizer: str
    teacher: OpenedCheckpoint | None
    text_bytes: TextBytes
    notes: list[str]
    tasks: RunTasks


def check_place(config: RunConfig, experiment: str | None = None) -> RunFolder:
    """The run's folder. Raises ``UserError`` if it holds another run, or a logger is not installed. ``experiment``: see
    ``RunFolder.check``."""
    check_loggers(config.logging)
    folder = RunFolder(Path(config.run_folder))
    folder.check(config, experiment=experiment)
    return folder


@collective
def open_inputs(plan: Plan, world_size: int, device: torch.device) -> Inputs:
    """Everything that a run of ``plan`` on ``world_size`` ranks reads besides its weights. Writes only the cache of orders.
    Of a resumed run with ``distill`` all ranks call it. Raises ``UserError`` for anything that the run would be refused for."""
    config = plan.config
    layout = choose_layout(config.parallel, world_size)
    fit = check_fit(config, plan.model, layout, plan.taught_by)
    texts = settle_texts(plan)
    files = TokenFiles(config.data, plan.model.vocab_size)
    data = open_data(plan, files)
    validation, left_out = open_validation(config, files)
    text_bytes = TextBytes(config, texts.eod)
    check_held_out(plan, validation)
    precision = settle_precision(config, device)
    documents = _documents(plan, texts)
    apart = documents is not None and documents.separates
    no_copies = without_copies(precision, config.parallel, layout, compiled=config.kernels.use == "compile")
    if layout.tensor > 1:
        no_copies = "tensor ranks divide its weights"
    length = config.data.sequence_length
    operations, remarks = choose_operations(
        config.kernels, plan.model, device, DTYPES[precision], length=length, documents=apart, no_copies=no_copies
    )
    graph, graphed = choose_graph(config, plan.model, layout, device, precision, operations, apart)
    valuation = check_valuation(config, [windows.name for windows in validation], precision, layout)
    optimizer, about = choose_optimizer(config.kernels, device)
    teacher = None
    if not isinstance(plan.source, PlannedCheckpoint):  # a file that isn't written yet is checked when it is
        _check_weights(plan)
    if config.distill is not None and plan.has_steps_left:
        teacher = _teacher(plan)
    choices = [*differing_choices(config, plan.source), *([] if plan.resumed else other_optimizer(config, plan.source))]
    loaded = plan.source.notes if plan.source else []
    notes = [
        *loaded,
        *choices,
        *data.notes,
        *left_out,
        *fit,
        *texts.notes,
        *remarks,
        *graphed,
        *about,
        *valuation,
        *_unusual(config),
    ]
    notes += about_precision(config.training.precision, precision, device, count_parameters(plan.model))
    tasks = open_tasks(plan, texts, layout)
    notes += about_average(plan)
    notes += text_bytes.notes
    notes += [*_about_teacher(plan, teacher), *tasks.notes]
    return Inputs(
        layout, texts, data, validation, documents, precision, operations, graph, optimizer, teacher, text_bytes, notes, tasks
    )


def check_training(plan: Plan) -> None:
    """Raise ``UserError`` if steps of ``plan`` could not be saved as they have to be. Reads no data."""
    check_saving(plan.config, plan.origin.step, plan.origin.step + plan.schedule.warmup_steps)
    check_roll_back(plan.config)
    check_average(plan)
    RunFolder(Path(plan.config.run_folder)).check_writable()


def settle_precision(config: RunConfig, device: torch.device) -> str:
    """The precision that ``training.precision`` means on ``device``. Raises ``UserError`` if the device can't compute in it."""
    wanted = config.training.precision
    able = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "bf16" and not able:
        raise UserError("training.precision: this GPU has no bf16; set it to fp16 or fp32")
    if wanted == "auto":
        return "bf16" if device.type == "cuda" and able else "fp32"
    return wanted


def about_precision(wanted: str, precision: str, device: torch.device, parameters: int) -> list[str]:
    """A line where a CPU computes the ``precision`` bf16 in fp32, with roundings on the way, and where it has the arithmetic
    of bf16 and 'auto' (``wanted``) leaves it idle for a model of so many ``parameters`` that it is worth a key."""
    found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    if device.type != "cpu" or not found:
        return []
    able = any(there for name, there in found.items() if name.rpartition("_")[2] == "bf16")  # x86 prefixes its names, ARM not
    if precision == "bf16" and not able:
        kinds = "AVX512_BF16, AMX, ARM's BF16"
        return [f"training.precision: this CPU has no bf16 arithmetic ({kinds}), so steps are slower than in fp32"]
    if wanted == "auto" and precision == "fp32" and able and parameters >= _WORTH_BF16:
        return [
            "training.precision: auto is fp32 on a CPU; this one has bf16 arithmetic, which is about twice as fast: set bf16"
        ]
    return []


def _unusual(config: RunConfig) -> list[str]:
    peak = config.schedule.max_lr
    if peak <= _HIGHEST_USUAL:
        return []
    return [f"schedule.max_lr {peak:g} is above {_HIGHEST_USUAL:g}; Pythia's peaks are 1.2e-4 (12B) to 1e-3 (14M)"]


def _check_weights(plan: Plan) -> None:
    """Names, shapes and dtypes of the tensors to load; their values are checked during loading."""
    if plan.policy.weights != "load" or plan.resumed or plan.source is None or isinstance(plan.source, OwnCheckpoint):
        return
    opened: OpenedCheckpoint = plan.source  # type: ignore[assignment]
    check(opened.weights, expected_shapes(plan.model))


def _teacher(plan: Plan) -> OpenedCheckpoint | None:
    """The checkpoint whose frozen model is the teacher, which a resumed run reads again; None if it is not written yet."""
    if plan.needs_teacher:
        if isinstance(plan.teacher, PlannedCheckpoint):
            return None
        named: OpenedCheckpoint = plan.teacher  # type: ignore[assignment]
        check(named.weights, expected_shapes(named.model_config))
        return named
    if isinstance(plan.source, PlannedCheckpoint):
        return None
    try:
        source = start_source(plan)
        if source is None:
            raise UserError("its weights were not loaded (start.weights: initialise)")
        opened: OpenedCheckpoint = source  # type: ignore[assignment]
        check(opened.weights, expected_shapes(opened.model_config))
        settle_model(plan.config, opened)
    except UserError as error:
        raise UserError(f"distill: the start checkpoint is the teacher and can't be read: {error}") from error
    return opened


def _about_teacher(plan: Plan, teacher: OpenedCheckpoint | None) -> list[str]:
    if teacher is None:
        return []
    if not plan.needs_teacher:
        if plan.config.start.intent not in ("resume", "branch"):
            return []
        return [f"distill: the teacher is {teacher.name} itself, not the start of the run that is continued here"]
    theirs, ours = teacher.model_config.vocab_size, plan.model.vocab_size
    notes = [*teacher.notes, f"distill: the teacher is {teacher.name}, {count_parameters(teacher.model_config):,} parameters"]
    if theirs == ours:
        return notes
    return [
        *notes,
        f"distill: the teacher {teacher.name} has {theirs:,} rows for ids, the model {ours:,}: its predictions are of the "
        f"first {min(theirs, ours):,}",
    ]


def _documents(plan: Plan, texts: Texts) -> DocumentRules | None:
    """The id that ends a document, if this run uses it."""
    data = plan.config.data
    is_packed = data.pack is not None
    if not (data.reset_at_eod or data.mask_eod_loss):
        return DocumentRules(IGNORE, reset=False, mask_loss=False, packed=True) if is_packed else None
    eod = texts.eod
    assert eod is not None
    if eod >= plan.model.vocab_size:
        raise UserError(
            f"data.eod: {eod} is outside of the model's vocabulary of {plan.model.vocab_size} ids; give the id that ends the "
            f"documents of the data"
        )
    return DocumentRules(eod, data.reset_at_eod, data.mask_eod_loss, is_packed)
