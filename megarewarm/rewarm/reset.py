"""The reset table: every counter of a loaded checkpoint has its own row, which shows its value before and after, and is
verified on the built run.

The rows follow from an intent (``resume``, ``rewarm``, ``branch``, ``scratch``) and each can be overridden. The table is
applied after everything is loaded, so no loader can restore what it resets.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from megarewarm.checkpoint.own.state import TrainingState
from megarewarm.checkpoint.source import CheckpointSource
from megarewarm.config.model import ModelConfig, RotaryScaling
from megarewarm.config.schema import Intent, StartConfig
from megarewarm.errors import UserError
from megarewarm.model.optimizer_state import state_kinds
from megarewarm.rewarm.freezing import Freezing
from megarewarm.schedules.schedule import Schedule


@dataclass(frozen=True)
class ResetPolicy:
    """One choice per row. The names are the keys of ``start`` in the config."""

    intent: Intent
    weights: Literal["load", "initialise"]
    moments: Literal["keep", "reset", "keep_second", "measure"]
    optimizer_step: Literal["keep", "reset", "measure"]
    schedule: Literal["restart", "continue"]
    iteration: Literal["restart", "continue"]
    data: Literal["restart", "continue"]
    rng: Literal["reseed", "keep"]
    loss_scale: Literal["keep", "reset"]

    def lines(self) -> dict[str, str]:
        """Row -> choice, without the intent."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "intent"}


PRESETS: dict[Intent, ResetPolicy] = {
    "scratch": ResetPolicy("scratch", "initialise", "reset", "reset", "restart", "restart", "restart", "reseed", "reset"),
    "resume": ResetPolicy("resume", "load", "keep", "keep", "continue", "continue", "continue", "keep", "keep"),
    "rewarm": ResetPolicy("rewarm", "load", "reset", "reset", "restart", "restart", "restart", "reseed", "reset"),
    "branch": ResetPolicy("branch", "load", "keep", "keep", "restart", "restart", "continue", "keep", "keep"),
    "continue": ResetPolicy("continue", "load", "keep", "keep", "restart", "restart", "restart", "keep", "keep"),
}

_NEEDS_TRAINING_STATE = {
    "moments": ("keep", "keep_second"),
    "optimizer_step": ("keep",),
    "schedule": ("continue",),
    "iteration": ("continue",),
    "data": ("continue",),
    "rng": ("keep",),
    "loss_scale": ("keep",),
}
_OPPOSITE = {"keep": "reset", "keep_second": "reset", "continue": "restart"}


def resolve(start: StartConfig, source: CheckpointSource | None) -> ResetPolicy:
    """The policy that ``start`` asks for, refused here if the checkpoint can't honour it. ``source`` is the opened
    checkpoint, or None from scratch. Raises ``UserError`` naming the row and the remedy."""
    intent: Intent = start.intent or ("rewarm" if source is not None else "scratch")
    chosen: dict[str, Any] = PRESETS[intent].lines()
    given = {line: value for line in chosen if (value := getattr(start, line)) is not None}
    chosen |= given
    if "optimizer_step" not in given and "moments" in given:
        # moments and the count that corrects their bias belong together unless the user separates them
        chosen["optimizer_step"] = "keep" if chosen["moments"] == "keep_second" else chosen["moments"]
    policy = ResetPolicy(intent=intent, **chosen)
    _refuse_contradictions(policy, source)
    return policy


def _refuse_contradictions(policy: ResetPolicy, source: CheckpointSource | None) -> None:
    if policy.moments == "measure" and policy.optimizer_step != "measure":
        raise UserError(
            f"start.optimizer_step: '{policy.optimizer_step}' contradicts moments 'measure', whose count is that of the "
            f"measured batches; remove it"
        )
    if source is None:
        if policy.moments == "measure":
            raise UserError("start.moments: 'measure' is for a checkpoint without moments; a run from scratch has 'reset'")
        if policy.weights == "load":
            raise UserError("start.weights: 'load' needs 'start.from': the checkpoint to load")
        for line, needing in _NEEDS_TRAINING_STATE.items():
            if (value := policy.lines()[line]) in needing:
                remedy = "reseed" if line == "rng" else _OPPOSITE[value]
                raise UserError(f"start.{line}: nothing to {value} in a run from scratch; set it to '{remedy}'")
        return
    for line, needing in _NEEDS_TRAINING_STATE.items():
        if (value := policy.lines()[line]) in needing and line not in source.keeps:
            remedy = "reseed" if line == "rng" else _OPPOSITE[value]
            holds = "holds weights only" if source.training is None else "holds none that can be used here"
            if line == "moments" and (smaller := source.lineage.grown_from) is not None:
                holds = f"was grown from {smaller}, whose moments are of another shape"
            hint = " (intent 'rewarm' does so)" if source.training is None else ""
            raise UserError(
                f"start.{line}: '{value}' can't be honoured, {source.name} ({source.format}) {holds}; set it to "
                f"'{remedy}'{hint}"
            )
    if policy.moments == "reset" and policy.optimizer_step == "keep":
        raise UserError(
            "start.optimizer_step: 'keep' with moments 'reset' would leave the new moments without bias correction; set both "
            "to 'keep' or both to 'reset'"
        )
    if policy.weights == "initialise" and policy.moments not in ("reset", "measure"):
        raise UserError("start.moments: moments of other weights are meaningless for new ones; set it to 'reset'")


@dataclass(frozen=True)
class Position:
    """A run's position: completed steps of the loop, schedule position, consumed samples, Adam's count."""

    step: int
    schedule: int
    samples: int
    optimizer_step: int


def start_position(policy: ResetPolicy, training: TrainingState | None, measured: int = 0) -> Position:
    """The counters that the policy keeps of a checkpoint's ``training`` state. ``measured``: batches of measured moments."""
    if training is None:
        return Position(0, 0, 0, measured)
    return Position(
        step=training.step if policy.iteration == "continue" else 0,
        schedule=training.schedule_position if policy.schedule == "continue" else 0,
        samples=training.samples if policy.data == "continue" else 0,
        optimizer_step=training.optimizer_step if policy.optimizer_step == "keep" else measured,
    )


@dataclass(frozen=True)
class ResetLine:
    """One row of the printed table."""

    line: str
    choice: str
    checkpoint_had: str
    run_has: str


def table(
    policy: ResetPolicy,
    source: CheckpointSource | None,
    schedule: Schedule,
    position: Position,
    parameters: int,
    seed: int,
    loss_scale: float | None = None,
    freezing: Freezing | None = None,
    model: ModelConfig | None = None,
) -> list[ResetLine]:
    """The reset table with the values of both sides, in the order of the config's keys. Positions of ``model`` that are not the
    checkpoint's are a line of their own."""
    old = source.training if source is not None else None
    nothing = "-" if source is None else "not stored"
    smaller = source.lineage.grown_from if source is not None else None
    had = {
        "weights": f"{source.name} ({source.format})" if source else "-",
        "moments": f"{state_kinds(old.optimizer)} after {old.optimizer_step:,} steps"
        if old
        else f"none: grown from {smaller}"
        if smaller
        else nothing,
        "optimizer_step": f"{old.optimizer_step:,}" if old else nothing,
        "schedule": f"{old.schedule['curve']} at {old.schedule_position:,}, last lr {old.last_lr:.4g}" if old else nothing,
        "iteration": f"{old.step:,}" if old else nothing,
        "data": f"sample {old.samples:,} of {old.data_fingerprint[:8] or 'files unknown'}" if old else nothing,
        "rng": "state" if source is not None and "rng" in source.keeps else nothing,
        "loss_scale": (f"{old.loss_scale['scale']:g}" if old.loss_scale else "none") if old else nothing,
    }
    moments = {
        "keep": "kept",
        "reset": "zero",
        "keep_second": "exp_avg_sq kept, others zero",
        "measure": f"measured at rate 0 over the {position.optimizer_step:,} batches of the first steps",
    }
    has = {
        "weights": f"{parameters:,} parameters " + ("loaded" if policy.weights == "load" else f"initialised, seed {seed}"),
        "moments": moments[policy.moments] + (freezing.of_moments if freezing is not None else ""),
        "optimizer_step": f"{position.optimizer_step:,}" if old or policy.optimizer_step != "keep" else "the checkpoint's",
        "schedule": f"{schedule.curve} at {position.schedule:,}, first lr {schedule.lr(position.schedule):.4g}, "
        f"peak {schedule.max_lr:.4g}",
        "iteration": f"{position.step:,}",
        "data": f"sample {position.samples:,}",
        "rng": f"seed {seed}" if policy.rng == "reseed" else "kept",
        "loss_scale": "none" if loss_scale is None else f"{loss_scale:g}",
    }
    lines = [ResetLine(line, choice, had[line], has[line]) for line, choice in policy.lines().items()]
    if source is not None and model is not None and policy.weights == "load":
        before, after = positions_text(source.model_config), positions_text(model)
        if before != after:
            lines.insert(1, ResetLine("context", "change", before, after))
    return lines


def positions_text(model: ModelConfig) -> str:
    """How a model counts positions: '2,048 positions, base 10000, yarn x 4 of 2,048'."""
    scaling = model.rotary_scaling
    text = f"{model.max_positions:,} positions, base {model.rotary_base:g}"
    if scaling is None:
        return text
    usual = {name: each.default for name, each in RotaryScaling.model_fields.items()}
    others = [
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in scaling.model_dump().items()
        if key not in ("kind", "factor", "original_positions") and value != usual[key]
    ]
    of = f" of {scaling.original_positions:,}" if scaling.original_positions else ""
    return ", ".join([text, f"{scaling.kind} x {scaling.factor:g}{of}", *others])
