"""Plans of runs whose start checkpoint is not written yet or not on this machine, complete enough to show and to estimate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megarewarm.checkpoint.lineage import Lineage, Stage
from megarewarm.checkpoint.own.state import TrainingState
from megarewarm.checkpoint.source import ALL_LINES, open_checkpoint
from megarewarm.config.schema import RunConfig
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.mixture.batches import TrainingBatches
from megarewarm.data.text.hub_tokenizer import HUB_NAME
from megarewarm.errors import UserError
from megarewarm.record.layout import CHECKPOINTS, step_of
from megarewarm.training.finish import is_trained
from megarewarm.training.output.run_folder import RunFolder
from megarewarm.training.start.plan import Plan, plan_start, with_teacher
from megarewarm.training.start.planned import PlannedCheckpoint
from megarewarm.training.start.run_data import data_seen, open_data
from megarewarm.training.start.saving import is_saved
from megarewarm.training.start.teacher import open_teacher

_MAY_HOLD = frozenset({"moments", "optimizer_step", "loss_scale"})
"""Rows of the reset table that a folder which is not here may provide, and that change no number of a plan."""


def plan_ahead(config: RunConfig, earlier: Sequence[Plan] = ()) -> tuple[Plan, list[str]]:
    """(the plan, a line for each start checkpoint that this machine lacks).

    A start checkpoint that one of the ``earlier`` plans will write is described by that plan. Raises ``UserError``.
    """
    plan, missing = _plan_start_ahead(config, earlier)
    if not plan.needs_teacher:
        return plan, missing
    assert config.distill is not None and config.distill.from_ is not None
    name = config.distill.from_
    if (planned := _planned("distill.from", name, earlier)) is not None:
        return with_teacher(plan, planned), missing
    try:
        return with_teacher(plan, open_teacher(plan.config)), missing
    except UserError as error:
        if _opens(name):
            raise
        # of unknown shape: as the model
        return with_teacher(plan, PlannedCheckpoint(name, plan.model)), [*missing, str(error)]


def _plan_start_ahead(config: RunConfig, earlier: Sequence[Plan]) -> tuple[Plan, list[str]]:
    start = config.start.from_
    if start is not None and (planned := _planned("start.from", start, earlier)) is not None:
        return plan_start(config, source=planned), []
    try:
        return plan_start(config), []
    except UserError as error:
        if config.model is None or start is None or _opens(start):
            raise
        keeps = frozenset[str]() if HUB_NAME.fullmatch(start) else _MAY_HOLD  # the hub's hold weights only
        return plan_start(config, source=PlannedCheckpoint(start, config.model, keeps=keeps)), [str(error)]


def _planned(key: str, name: str, earlier: Sequence[Plan]) -> PlannedCheckpoint | None:
    """The checkpoint ``name``, which ``key`` names, if one of the ``earlier`` plans will write it."""
    for plan in earlier:
        if Path(name).is_dir() and (Path(name) != Path(plan.config.run_folder) or is_trained(plan)):
            continue  # it exists; the folder of an unfinished run names a checkpoint that doesn't exist yet
        if (at_end := _written_at_end(name, plan)) is not None:
            return at_end
        if (step := _step_named(key, name, plan)) is not None:
            state = _state_after(plan, step)
            written = PlannedCheckpoint(name, plan.model, "not yet written", training=state, lineage=state.lineage)
            written.keeps, written.written_by = ALL_LINES, plan
            return written
    return None


def _written_at_end(name: str, plan: Plan) -> PlannedCheckpoint | None:
    """The checkpoint ``name`` if the planned run writes it after its last step, weights only: its average, or its export."""
    folder = RunFolder(Path(plan.config.run_folder))
    averaged = Path(name) == folder.average and plan.config.checkpoint.average is not None
    if not averaged and not (Path(name) == folder.export and plan.config.export.huggingface):
        return None
    lineage = _state_after(plan, plan.config.total_steps).lineage if averaged else Lineage()
    return PlannedCheckpoint(name, plan.model, "not yet written", lineage=lineage, written_by=plan)


def _opens(name: str) -> bool:
    """Whether the checkpoint can be opened here. If so, the plan failed for another reason."""
    try:
        open_checkpoint(name)
    except UserError:
        return False
    return True


def _step_named(key: str, start: str, plan: Plan) -> int | None:
    """The step of checkpoint ``start`` if it belongs to the planned run, else None."""
    folder = Path(plan.config.run_folder)
    if Path(start) == folder:
        return plan.config.total_steps
    if Path(start).parent != folder / CHECKPOINTS:
        return None
    step = step_of(Path(start).name)
    if step is None or not plan.origin.step < step <= plan.config.total_steps or not is_saved(plan.config, step):
        raise UserError(
            f"{key}: {start} will not be written: run '{plan.config.name}' saves no checkpoint of that name; add the step "
            f"to its checkpoint.extra_steps, or write {folder}@{Path(start).name if step is None else step} steps"
        )
    return step


def _state_after(plan: Plan, step: int) -> TrainingState:
    data = _data_of(plan)
    stage = Stage(
        run=plan.config.name,
        intent=plan.policy.intent,
        started_from=plan.config.start.from_,
        steps=step - plan.origin.step,
        tokens=(step - plan.origin.step) * plan.config.tokens_per_step,
        schedule=plan.schedule.spec(),
        data=[] if data is None else data_seen(plan, data, step),
        goes_on=plan.goes_on,
        optimizer=plan.config.optimizer.kind,
    )
    return TrainingState(
        run=plan.config.name,
        intent=plan.policy.intent,
        step=step,
        tokens=stage.tokens,
        optimizer_step=plan.position.optimizer_step + step - plan.position.step,
        schedule_position=plan.schedule_position(step),
        schedule=plan.schedule.spec(),
        last_lr=plan.lr(step),
        samples=plan.samples(step),
        data_fingerprint="" if data is None else data.fingerprint(before=plan.samples(step)),
        model=plan.model,
        lineage=plan.history.extended(stage),
        start_position=(plan.origin.step, plan.origin.schedule, plan.origin.samples),
        step_tokens=plan.tokens(step),
        optimizer=plan.config.optimizer.kind,
        trained=None if plan.freezing is None or (trained := plan.freezing.after(step)) is None else dict(trained),
    )


def _data_of(plan: Plan) -> TrainingBatches | None:
    """The data of a planned run; None if they don't exist yet or can't be opened for another reason, which the run's own start
    reports."""
    try:
        return open_data(plan, TokenFiles(plan.config.data, plan.model.vocab_size))
    except UserError:
        return None
