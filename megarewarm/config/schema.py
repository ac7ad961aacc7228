"""The schema of a run: what is trained, on what, from where, along which curve; the rest is in ``execution``.

The one place for every key, its meaning and its default: ``docs/config.md`` and ``docs/config.schema.json`` are
generated from it (``python tools/document_config.py``).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from megarewarm.config.budget import Budget, in_epochs
from megarewarm.config.data import DataConfig, ReplayConfig
from megarewarm.config.execution import (
    CheckpointConfig,
    EvaluationConfig,
    ExportConfig,
    KernelsConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)
from megarewarm.config.forgetting import DistillConfig, InterpolateConfig
from megarewarm.config.grid import Grid
from megarewarm.config.model import CONTEXT_KEYS, ContextConfig, ModelConfig
from megarewarm.config.paths import PathText
from megarewarm.config.reliability import ReliabilityConfig
from megarewarm.config.schedule import ScheduleConfig
from megarewarm.config.section import FolderName, Positive, Section
from megarewarm.config.valuation import ValuationConfig
from megarewarm.errors import UserError

Intent = Literal["scratch", "resume", "rewarm", "branch", "continue"]


class StartConfig(Section):
    """What this run starts from, and what of the checkpoint it keeps. ``intent`` presets the lines below it."""

    from_: PathText | None = Field(
        None,
        alias="from",
        description="A megarewarm run or checkpoint folder; a Hugging Face folder or hub name (name@revision) of a "
        "family in docs/models.md; a GPT-NeoX folder (global_stepN, or the one with 'latest'), with its optimizer where its "
        "files are there; a Megatron-LM folder ('torch' format, weights). Null: from scratch.",
    )
    intent: Intent | None = Field(
        None,
        description="scratch | resume (bit-exact continuation) | rewarm (new schedule, usually new data) | branch (leave a "
        "constant phase to anneal; data and moments kept) | continue (new data at the checkpoint's learning rate, as "
        "from one data set of an infinite schedule to the next; moments kept). Null: scratch without 'from', rewarm with it.",
    )
    weights: Literal["load", "initialise"] | None = Field(None, description="Model weights.")
    moments: Literal["keep", "reset", "keep_second", "measure"] | None = Field(
        None,
        description="Adam's exp_avg and exp_avg_sq; keep_second keeps only exp_avg_sq. measure: for a checkpoint without "
        "moments, those that 'measure_batches' steps at rate 0 leave, clipped as every step.",
    )
    measure_batches: Positive = Field(
        100,
        description="Of moments 'measure': how many batches, those of the run's first steps, which it then trains on as well.",
    )
    optimizer_step: Literal["keep", "reset"] | None = Field(
        None,
        description="Adam's step count, which sets the bias correction. With moments 'measure' it follows from "
        "'measure_batches'.",
    )
    schedule: Literal["restart", "continue"] | None = Field(
        None, description="restart: lr(0) of this file's schedule; continue: the checkpoint's schedule position."
    )
    iteration: Literal["restart", "continue"] | None = Field(
        None, description="The loop's step counter (names of checkpoints, x axis of the logs)."
    )
    data: Literal["restart", "continue"] | None = Field(
        None, description="Position in the training data, counted in samples of this run's data."
    )
    rng: Literal["reseed", "keep"] | None = Field(None, description="State of the random number generators.")
    loss_scale: Literal["keep", "reset"] | None = Field(
        None, description="The dynamic loss scale of fp16; without meaning in other precisions."
    )

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @model_validator(mode="after")
    def _check(self) -> StartConfig:
        if self.from_ is None and self.intent not in (None, "scratch"):
            raise ValueError(f"intent '{self.intent}' needs 'from': the checkpoint to start from")
        if self.from_ is not None and self.intent == "scratch":
            raise ValueError("intent 'scratch' contradicts 'from': remove one of them")
        return self


_SHAPE = {name for name, field in ModelConfig.model_fields.items() if field.is_required()}
_MOST_STEPS = 10**10  # far above any run, and their samples can be counted in 64 bits


class RunConfig(Section):
    """One training run."""

    name: FolderName = Field(description="Name of the run; the run folder is called after it.")
    folder: PathText | None = Field(None, description="Run folder; null: runs/NAME.")
    model: ModelConfig | None = Field(None, description="Shape of the model; null: the start checkpoint's.")
    context: ContextConfig | None = Field(
        None,
        description="Other rotary positions than the start checkpoint's, and a longer context; null: as it is. A 'model' of "
        "these keys alone, over a start, means the same.",
    )
    start: StartConfig = StartConfig()
    data: DataConfig
    replay: ReplayConfig | None = Field(None, description="Replay of old data; null: none.")
    distill: DistillConfig | None = Field(
        None, description="Distillation from a frozen teacher, such as the start checkpoint; null: none."
    )
    interpolate: InterpolateConfig | None = Field(None, description="Weights between start and end, evaluated; null: none.")
    valuation: ValuationConfig | None = Field(
        None, description="What training rows do to validation losses, measured during the run; null: not measured."
    )
    schedule: ScheduleConfig
    training: TrainingConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()
    logging: LoggingConfig = LoggingConfig()
    kernels: KernelsConfig = KernelsConfig()
    parallel: ParallelConfig = ParallelConfig()
    reliability: ReliabilityConfig = ReliabilityConfig()
    intervals: Literal["exact", "rounded"] = Field(
        "exact",
        description="How intervals that are shares of the run, or tokens, become steps. exact: the k-th time is after "
        "round(k x interval) steps, so that every time of '20%' is one of '10%' in a run of any length. rounded: the interval "
        "is rounded to whole steps first, as earlier versions did; a run that one of these began keeps it.",
    )

    @model_validator(mode="before")
    @classmethod
    def _context(cls, values: Any) -> Any:
        """A ``model`` that only changes the positions of the start's model is a ``context``."""
        if not isinstance(values, dict) or not isinstance(values.get("model"), dict) or values.get("context") is not None:
            return values
        model, start = values["model"], values.get("start")
        begins = start.get("from", start.get("from_")) if isinstance(start, dict) else getattr(start, "from_", None)
        if not begins or not set(model) & set(CONTEXT_KEYS) or set(model) & _SHAPE:
            return values
        return values | {"model": None, "context": model}

    @model_validator(mode="after")
    def _no_replay(self) -> RunConfig:
        """A fraction of 0 is no replay, so that an axis may hold it."""
        later = any(switch.replay_fraction for switch in self.data.switches)
        if self.replay is not None and not self.replay.fraction and not later:
            object.__setattr__(self, "replay", None)
        elif self.replay is not None and self.replay.of is None and self.replay.sources is None:
            raise ValueError("replay: nothing says what is replayed: give 'sources', 'of: lineage' or 'of: start'")
        return self

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.model is None and self.start.from_ is None:
            raise ValueError("a run from scratch needs 'model': the shape to train; or give 'start.from': a checkpoint")
        if self.context is not None and self.start.from_ is None:
            raise ValueError("context changes the model of 'start.from': give it, or all of 'model'")
        if self.context is not None and self.distill is not None and self.distill.from_ is None:
            raise ValueError(
                "distill: the start checkpoint would teach with positions that it was not trained with; name a teacher with "
                "distill.from, or leave 'context' out"
            )
        if self.model is not None and self.data.sequence_length > self.model.max_positions:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} is above model.max_positions {self.model.max_positions}"
            )
        if self.evaluation.by_position and self.data.reset_at_eod:
            raise ValueError(
                "evaluation.by_position counts the positions of a window, and with data.reset_at_eod they begin again in each "
                "document: set one of them to false"
            )
        if self.evaluation.windows == "moving" and self.data.pack is not None:
            raise ValueError(
                "evaluation.windows 'moving' follows the training's windows, and data.pack has none: set it to fixed"
            )
        old = self.replay.sources or () if self.replay is not None else ()
        if self.data.pack is not None and any(source.layout == "rows" for source in old):
            raise ValueError("data.pack: a replay source of layout 'rows' holds finished rows: remove one of them")
        if self.evaluation.windows == "moving" and self.data.order_name == "scored":
            raise ValueError("evaluation.windows 'moving' follows data.order, which sorts by scores: set windows to 'fixed'")
        if self.replay is not None and self.replay.of is not None and self.start.from_ is None:
            whose = "whose data are replayed" if self.replay.of == "lineage" else "that writes the replay"
            raise ValueError(f"replay of: {self.replay.of} needs 'start.from': the checkpoint {whose}; or give 'sources'")
        if self.replay is not None and self.replay.of == "start" and self.data.order_name == "scored":
            raise ValueError("data.order sorts by scores, and what the start writes has none: choose another order or replay")
        if self.distill is not None and self.distill.from_ is None and self.start.from_ is None:
            raise ValueError("distill needs a teacher: give 'distill.from', or 'start.from', which is one; or remove 'distill'")
        if self.interpolate is not None and self.start.from_ is None:
            raise ValueError(
                "interpolate needs 'start.from': the checkpoint at the other end; give it, or remove 'interpolate'"
            )
        if self.valuation is not None:
            known = [entry.name for entry in self.data.validation]
            if unknown := [name for name in self.valuation.against if name not in known]:
                raise ValueError(
                    f"valuation.against: no validation set is named '{unknown[0]}'; data.validation has "
                    f"{', '.join(known) or 'none'}"
                )
            if self.optimizer.kind != "adamw":
                raise ValueError(
                    f"valuation: an update of '{self.optimizer.kind}' is not a sum of what single rows add to it; it works "
                    f"with optimizer.kind: adamw"
                )
        if self.replay is None and any(switch.replay_fraction for switch in self.data.switches):
            raise ValueError("data.switches: 'replay_fraction' has nothing to replay without 'replay': add it, or remove this")
        if self.data.switches and (keys := list(in_epochs(self))):
            raise ValueError(f"{keys[0]}: where data.switches change the blend an epoch has no length; give steps or tokens")
        if self.training.budget.unit != "epochs" and self.total_steps < 1:
            raise ValueError(
                f"training.budget '{self.training.budget}' is less than one step of {self.tokens_per_step:,} tokens"
            )
        if self.training.budget.unit != "epochs" and self.total_steps > _MOST_STEPS:
            raise ValueError(f"training.budget '{self.training.budget}' is more than {_MOST_STEPS:,} steps; give fewer")
        return self

    @property
    def run_folder(self) -> str:
        return self.folder or f"runs/{self.name}"

    @property
    def tokens_per_step(self) -> int:
        return self.training.global_batch * self.data.sequence_length

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run; a token budget is rounded to the nearest whole step. Raises ``UserError`` for one in
        epochs, which ``training/start/epochs.py`` counts."""
        if self.training.budget.unit == "epochs":
            raise UserError(
                f"training.budget: {self.training.budget} of {self.name} can't be counted here: give steps or tokens"
            )
        return round(self.training.budget.in_steps(self.tokens_per_step))

    def steps(self, budget: Budget) -> float:
        """``budget`` in optimizer steps of this run, unrounded."""
        return budget.in_steps(self.tokens_per_step, self.total_steps)

    def grid(self, interval: Budget | None) -> Grid:
        """The steps, counted from where the interval begins, at which ``interval`` is over again; None is never."""
        if interval is None:
            return Grid(self.total_steps + 1)
        if self.intervals == "rounded":
            return Grid(round(self.steps(interval)))
        return Grid(interval.exactly_in_steps(self.tokens_per_step, self.total_steps))
