"""The plan of a run: its start checkpoint, what it keeps, its schedule and its length, decided before anything is built."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from megarewarm.checkpoint.lineage import Lineage
from megarewarm.checkpoint.own.state import Thawed, TrainingState
from megarewarm.checkpoint.source import CheckpointSource, OwnCheckpoint, open_checkpoint
from megarewarm.config.data import Source
from megarewarm.config.model import ContextConfig, ModelConfig
from megarewarm.config.schedule import build_schedule
from megarewarm.config.schema import RunConfig
from megarewarm.data.mixture.phases import AnySource
from megarewarm.errors import UserError
from megarewarm.model.parameters import FUNCTION_KEYS, SHAPE_KEYS, cards
from megarewarm.model.trained import NEW_LAYERS, NEW_ROWS, Trained
from megarewarm.rewarm.freezing import Freezing, settle_freezing
from megarewarm.rewarm.own_replay import recorded_replay
from megarewarm.rewarm.replay import history_to_replay, replayed
from megarewarm.rewarm.reset import PRESETS, Position, ResetPolicy, resolve, start_position
from megarewarm.schedules.annealing import LearningRateSums, learning_rate_sums
from megarewarm.schedules.schedule import Schedule
from megarewarm.training.output.run_folder import RunFolder
from megarewarm.training.start.teacher import check_teacher, open_teacher


@dataclass(frozen=True)
class Plan:
    """``config`` has its model settled. ``source`` is what will be loaded, ``policy`` what of it is kept.

    ``origin`` is where the run began, ``position`` where it is now; they differ in a resumed run. ``resumed`` says that
    the run's own checkpoint is continued, in which case ``start`` has been applied before and is not applied again.
    ``origin_tokens``: tokens of the steps that had been counted at ``origin``, whatever their batches were. ``teacher``: what
    ``distill.from`` names, unless the run has no steps left. ``freezing``: what ``optimizer.train`` means, None without.
    ``own_replay``: what the start checkpoint wrote as its own replay, None where that is not asked for, or not written yet
    (start/own_replay.py).
    """

    config: RunConfig
    source: CheckpointSource | None
    policy: ResetPolicy
    schedule: Schedule
    origin: Position
    position: Position
    resumed: bool
    origin_tokens: int = 0
    teacher: CheckpointSource | None = None
    freezing: Freezing | None = None
    own_replay: Source | None = None

    @property
    def model(self) -> ModelConfig:
        assert self.config.model is not None
        return self.config.model

    @property
    def trains(self) -> Trained | None:
        """What has moments at ``position``; None for everything."""
        if self.resumed:
            assert self.source is not None and self.source.training is not None
            return self.source.training.trained
        return self.freezing.after(self.origin.step) if self.freezing is not None else None

    @property
    def trained_at_end(self) -> Trained | None:
        """The same at the end of the run, when it is most."""
        return self.freezing.after(self.config.total_steps) if self.freezing is not None else None

    @property
    def thawed(self) -> list[Thawed]:
        """Parameters whose moments, which are kept, began later than the others'."""
        training = self.source.training if self.source is not None else None
        if training is None or self.policy.optimizer_step != "keep":
            return []
        return training.thawed

    @property
    def has_steps_left(self) -> bool:
        """Whether the run trains on from ``position``."""
        return self.position.step < self.config.total_steps

    @property
    def needs_teacher(self) -> bool:
        """Whether the run is taught by another checkpoint than its start."""
        distill = self.config.distill
        return distill is not None and distill.from_ is not None and self.has_steps_left

    @property
    def measured_batches(self) -> int:
        """Batches of which moments are measured before the first step; 0 where none are."""
        return self.config.start.measure_batches if self.policy.moments == "measure" else 0

    @property
    def taught_by(self) -> ModelConfig | None:
        """The shape of the teacher; None without ``distill``."""
        if self.config.distill is None:
            return None
        return self.teacher.model_config if self.teacher is not None else self.model

    @property
    def history(self) -> Lineage:
        """The stages before this run: those of its start checkpoint."""
        if self.source is None:
            return Lineage()
        stages = self.source.lineage.stages
        return Lineage(stages=stages[:-1] if self.resumed else stages)

    @property
    def goes_on(self) -> bool:
        """Whether the run continues in the data of the stage before it."""
        if self.source is None or self.source.training is None:
            return False
        if not self.resumed:
            return self.policy.data == "continue"
        told = self.source.lineage.stages[-1].goes_on
        return self.origin.samples > 0 if told is None else told

    @property
    def history_to_replay(self) -> Lineage:
        """The stages that 'replay of: lineage' means."""
        return history_to_replay(self.history.stages, goes_on=self.goes_on)

    @property
    def awaits_replay(self) -> bool:
        """Whether the start checkpoint has yet to write its own replay."""
        return self.config.replay is not None and self.config.replay.of == "start" and self.own_replay is None

    def replayed(self) -> list[AnySource]:
        """The old data that the run replays, weighted among themselves. Raises ``UserError``."""
        return replayed(self.config.replay, self.history_to_replay, self.own_replay)

    def tokens(self, step: int) -> int:
        """Tokens of all steps up to ``step`` of the loop's counter: the x axis of the logs."""
        return self.origin_tokens + (step - self.origin.step) * self.config.tokens_per_step

    def schedule_position(self, step: int) -> int:
        """Position in the schedule once ``step`` steps of the run are completed."""
        return self.origin.schedule + step - self.origin.step

    def samples(self, step: int) -> int:
        """Samples consumed once ``step`` steps of the run are completed."""
        return self.origin.samples + (step - self.origin.step) * self.config.training.global_batch

    def lr(self, step: int) -> float:
        """The learning rate used in ``step``, counted from 1."""
        return self.schedule.lr(self.schedule_position(step - 1))

    def learning_rate_sums(self) -> LearningRateSums:
        """S1 and S2 after each step of the run, from ``origin`` on, whether it is resumed or not."""
        count = self.config.total_steps - self.origin.step
        return learning_rate_sums(self.schedule.values(self.origin.schedule + np.arange(count)))


def settle_model(config: RunConfig, source: CheckpointSource | None) -> RunConfig:
    """``config`` with a model: its own, checked against the checkpoint's shape, or the checkpoint's."""
    if source is None:
        return config
    stored = source.model_config
    if config.context is not None:
        if config.model is not None and config.context.applied(config.model) != config.model:
            raise UserError("context: 'model' says other positions: give one of them")
        stored = _in_context(config, config.context, stored, source.name)
    if config.model is None:
        settled = config.model_copy(update={"model": stored})
        if config.data.sequence_length > stored.max_positions:
            raise UserError(
                f"data.sequence_length {config.data.sequence_length} is above the {stored.max_positions} positions of "
                f"{source.name}{'' if config.context is None else ' in this context'}: lower it, or raise context.max_positions"
            )
        return settled
    if config.model.rotary_scaling != stored.rotary_scaling:
        _refuse_other_reading(config.model, "model")
    for attribute, key in SHAPE_KEYS.items():
        ours, theirs = getattr(config.model, attribute), getattr(stored, attribute)
        if ours != theirs:
            raise UserError(
                f"model.{key}: {ours} in the config, {theirs} in the checkpoint {source.name}; make them agree, or leave "
                f"'model' out to take the checkpoint's"
            )
    return config


def _in_context(config: RunConfig, context: ContextConfig, stored: ModelConfig, name: str) -> ModelConfig:
    """The checkpoint's model with the positions that ``context`` sets. Raises ``UserError``."""
    try:
        model = context.applied(stored)
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"context: does not fit the model of {name}: {problem}") from error
    if not model.rotary_dims and (context.rotary_base is not None or context.rotary_scaling is not None):
        raise UserError(f"context: the model of {name} rotates no channels; only max_positions can be set")
    _refuse_other_reading(model, "context")
    return model


def _refuse_other_reading(model: ModelConfig, section: str) -> None:
    """Raise ``UserError`` for a scaling that a version of transformers would read differently: version 4 takes the ratio of the
    positions as YaRN's factor, whatever ``factor`` says."""
    scaling = model.rotary_scaling
    if scaling is None or scaling.kind != "yarn":
        return
    assert scaling.original_positions is not None
    if not math.isclose(scaling.factor * scaling.original_positions, model.max_positions, rel_tol=1e-9):
        raise UserError(
            f"{section}.rotary_scaling: factor {scaling.factor:g} of {scaling.original_positions:,} original_positions is not "
            f"max_positions {model.max_positions:,}; transformers 4 would take their ratio for the factor: make them agree"
        )


def differing_choices(config: RunConfig, source: CheckpointSource | None) -> list[str]:
    """Model keys that keep the shapes but change the function, if the config overrides the checkpoint; but for those that the
    line 'context' of the reset table shows."""
    if source is None or config.model is None:
        return []
    return [
        f"model.{key}: the checkpoint {source.name} says {getattr(source.model_config, key)}, this run uses "
        f"{getattr(config.model, key)}"
        for key in FUNCTION_KEYS
        if key not in ("rotary_base", "rotary_scaling") and getattr(config.model, key) != getattr(source.model_config, key)
    ]


def other_optimizer(config: RunConfig, source: CheckpointSource | None) -> list[str]:
    """A note if the checkpoint was, or may have been, trained with another optimizer than this run's."""
    kind = config.optimizer.kind
    if source is None:
        return []
    # checkpoints of earlier versions name the last optimizer only
    before = source.lineage.optimizers or ([source.training.optimizer] if source.training is not None else [])
    if set(before) == {kind} or (not before and kind == "adamw"):
        return []
    said = f"{source.name} was trained with {', then '.join(before)}" if before else f"if {source.name} was trained with Adam"
    return [
        f"optimizer.kind: {kind}; {said}{'' if before else ', as Pythia and most models were'}: a change of optimizer "
        f"costs quality and increases forgetting (arXiv 2605.10468, 2605.06654)"
    ]


def _require_moments(config: RunConfig, policy: ResetPolicy, source: CheckpointSource | None) -> None:
    """Raise ``UserError`` if moments of another optimizer would be kept, or measured where the checkpoint's could be."""
    if source is None or (training := source.training) is None:
        return
    same = training.optimizer == config.optimizer.kind
    if policy.moments == "measure" and same and "moments" in source.keeps:
        raise UserError(
            f"start.moments: 'measure' is for checkpoints without moments, {source.name} has those of "
            f"{training.optimizer_step:,} steps; set it to 'keep', 'keep_second' or 'reset', or start from an export, "
            f"which has none (megarewarm convert)"
        )
    if policy.moments in ("keep", "keep_second") and not same:
        raise UserError(
            f"start.moments: '{policy.moments}' can't be honoured, the checkpoint's are those of {training.optimizer} and "
            f"optimizer.kind is {config.optimizer.kind}; set start.moments to 'reset' (intent 'rewarm' does so)"
        )


def _freezing(config: RunConfig, source: CheckpointSource | None, history: Lineage, first: int = 0) -> Freezing | None:
    settings = config.optimizer.train
    if config.model is None or settings is None:
        return None
    if source is not None and not source.lineage.stages and {NEW_LAYERS, NEW_ROWS} & set(settings.only):
        source.notes.append(f"optimizer.train.only: what trains is known once {source.name} exists; planned for all of it")
        return None
    return settle_freezing(config, config.model, history, first)


def _require_moments_of_trained(needed: Trained | None, source: CheckpointSource | None, policy: ResetPolicy) -> None:
    """Raise ``UserError`` if moments that are kept are those of fewer parameters than this run's."""
    if policy.moments in ("reset", "measure") or source is None or source.training is None:
        return
    every: Trained = dict.fromkeys(cards(source.model_config))
    held = every if source.training.trained is None else source.training.trained
    wanted = every if needed is None else needed
    if lacking := [name for name, rows in wanted.items() if name not in held or held[name] != rows]:
        raise UserError(
            f"start.moments: '{policy.moments}' can't be honoured, {source.name} has other moments than this run needs of "
            f"{len(lacking)} parameters, because of what was frozen ({lacking[0]}); set start.moments to 'reset' (intent "
            f"'rewarm' does so), or make optimizer.train the same"
        )


def make_plan(config: RunConfig, *, up_to: int | None = None) -> Plan:
    """The plan of ``config``: the run's own newest checkpoint if there is one, else ``start``; and its teacher.

    ``up_to``: the run's checkpoints of later steps don't count (to repeat a part of it). Raises ``UserError`` for a start that
    can't be honoured, and for a teacher that can't teach it.
    """
    plan = plan_start(config, up_to=up_to)
    return with_teacher(plan, open_teacher(plan.config)) if plan.needs_teacher else plan


def with_teacher(plan: Plan, teacher: CheckpointSource) -> Plan:
    """``plan`` with the teacher that ``distill.from`` names. Raises ``UserError`` for one that can't teach its model."""
    check_teacher(plan.config, plan.model, teacher)
    return replace(plan, teacher=teacher)


def plan_start(config: RunConfig, *, source: CheckpointSource | None = None, up_to: int | None = None) -> Plan:
    """``make_plan`` without the teacher. ``source`` replaces opening ``start.from`` (for a dry run without it)."""
    newest, passed_over = RunFolder(Path(config.run_folder)).newest_checkpoint(up_to=up_to)
    if newest is not None:
        own = OwnCheckpoint(newest, verified=True)
        own.notes += passed_over
        return _resumed(config, own)
    if source is None and config.start.from_ is not None:
        source = open_checkpoint(config.start.from_)
    policy = resolve(config.start, source)
    config = settle_model(config, source)
    training = source.training if source is not None else None
    _require_moments(config, policy, source)
    origin = start_position(policy, training, config.start.measure_batches if policy.moments == "measure" else 0)
    schedule = _schedule(config, policy, origin)
    if policy.intent == "resume" and training is not None and policy.schedule == "continue":
        _require_same_curve(schedule, training, foreign=not isinstance(source, OwnCheckpoint))
    if policy.intent == "continue" and training is not None and policy.schedule == "restart":
        _require_same_rate(schedule.lr(origin.schedule), training)
    if origin.step >= config.total_steps:
        raise UserError(
            f"training.budget: the run is {config.total_steps:,} steps long and the checkpoint has done {origin.step:,}; raise "
            f"the budget or set start.iteration to 'restart'"
        )
    if policy.moments == "measure" and config.start.measure_batches > config.total_steps - origin.step:
        raise UserError(
            f"start.measure_batches: {config.start.measure_batches:,} batches are those of as many steps, and the run has "
            f"{config.total_steps - origin.step:,}; give at most as many"
        )
    before = origin.step * config.tokens_per_step
    if origin.step and training is not None and (told := training.tokens_counted) is not None:
        before = told
    _require_same_tokens(config, origin.step, before)
    first = 0 if policy.intent == "resume" else origin.step  # what is resumed may have thawed
    freezing = _freezing(config, source, source.lineage if source is not None else Lineage(), first)
    _require_moments_of_trained(freezing.after(origin.step) if freezing is not None else None, source, policy)
    same_data = policy.data == "continue" and training is not None
    written = recorded_replay(config.replay, training.lineage.stages) if same_data and training is not None else None
    return Plan(
        config,
        source,
        policy,
        schedule,
        origin,
        origin,
        resumed=False,
        origin_tokens=before,
        freezing=freezing,
        own_replay=written,
    )


def _require_same_tokens(config: RunConfig, step: int, tokens: int) -> None:
    """A budget in tokens counts all steps alike, including those before the start."""
    budget, each = config.training.budget, config.tokens_per_step
    if budget.unit == "tokens" and tokens != step * each:
        steps = step + max(0, round((budget.amount - tokens) / each))
        raise UserError(
            f"training.budget: '{budget}' is counted in steps of {each:,} tokens, and the {step:,} steps that the checkpoint "
            f"has done had {tokens:,} tokens in all; give it in steps: with {steps:,} steps the whole comes to {budget}"
        )


def _resumed(config: RunConfig, own: OwnCheckpoint) -> Plan:
    training = own.training
    assert training is not None
    config = settle_model(config, own)
    rule = RunFolder(Path(config.run_folder)).rule_of_intervals()
    if rule is not None and rule != config.intervals:
        own.notes.append(
            f"intervals: '{rule}', as when this run was begun: it evaluates and saves at the same steps as until now"
        )
        config = config.model_copy(update={"intervals": rule})
    step, schedule_position, samples = training.start_position
    origin = Position(step, schedule_position, samples, 0)
    done = training.tokens_counted
    before = step * config.tokens_per_step if done is None else done - (training.step - step) * config.tokens_per_step
    return Plan(
        config=config,
        source=own,
        policy=PRESETS["resume"],
        schedule=Schedule.from_spec(training.schedule),
        origin=origin,
        position=Position(training.step, training.schedule_position, training.samples, training.optimizer_step),
        resumed=True,
        origin_tokens=before,
        freezing=_freezing(config, own, Lineage(stages=own.lineage.stages[:-1])),
        own_replay=recorded_replay(config.replay, training.lineage.stages),
    )


def _schedule(config: RunConfig, policy: ResetPolicy, origin: Position) -> Schedule:
    # a restarted schedule has only the remaining steps; a continued one counts from its old beginning
    total = max(1, config.total_steps - (origin.step if policy.schedule == "restart" else 0))
    return build_schedule(config.schedule, lambda budget: budget.in_steps(config.tokens_per_step, total), total)


def _require_same_rate(first: float, training: TrainingState) -> None:
    if not math.isclose(first, training.last_lr, rel_tol=0.01):
        raise UserError(
            f"start.intent: 'continue' continues at the checkpoint's learning rate, {training.last_lr:.4g}, and this "
            f"schedule begins at {first:.4g}; set schedule.max_lr to that rate with curve 'constant' and warmup 0, or re-warm "
            f"(intent 'rewarm')"
        )


def _require_same_curve(schedule: Schedule, training: TrainingState, *, foreign: bool) -> None:
    ours, theirs = schedule.spec(), training.schedule
    # other programs have other names and record less: what they record must agree
    keys = {"max_lr", "min_lr"} & set(ours) & set(theirs) if foreign else set(ours) | set(theirs)
    for key in sorted(keys):
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"start.intent: 'resume' continues the checkpoint's schedule, but {key} was {theirs.get(key)} there and is "
                f"{ours.get(key)} here; use intent 'rewarm' or 'branch' for a new schedule, or make them equal"
            )
