"""A checkpoint's history: the stages of training that led to it, each with its data, tokens and schedule."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from megarewarm.data.files.file_identity import FileIdentity
from megarewarm.data.files.tokenizer_identity import TokenizerIdentity
from megarewarm.data.order.sample_order import SamplesRead

Loss = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A measured number, which may be NaN or infinite; revisions up to November 2026 wrote null for these."""


class DataSeen(FileIdentity):
    """What one stage read of one source, with the identity of its tokens, independent of the file's place. ``read``: the
    samples, without the ``left_out`` ones of steps that are not in the weights. (Earlier versions recorded neither: null,
    and ``read`` covers all.) ``generated_by``: the run or checkpoint whose model wrote it."""

    model_config = ConfigDict(frozen=True)

    name: str
    samples: int
    tokens: int
    read: SamplesRead | None = None
    left_out: int | None = None
    generated_by: str | None = None

    @property
    def file(self) -> FileIdentity:
        """The identity of the file alone."""
        return FileIdentity.model_validate(self.model_dump(include=set(FileIdentity.model_fields)))


class StatedTerms(BaseModel):
    """What is known of a start checkpoint for the model cards of its descendants; ``base_model`` is a name on the hub,
    ``optimizer`` the one that the card of an export names."""

    model_config = ConfigDict(frozen=True)

    license: str | None = None
    languages: list[str] = []
    base_model: str | None = None
    optimizer: str | None = None


class TaughtBy(BaseModel):
    """The teacher of a run with ``distill``. ``identity``: sha256 (hex) of some values of each of its parameters."""

    model_config = ConfigDict(frozen=True)

    name: str
    kind: str
    weight: float
    identity: str


class Stage(BaseModel):
    """One run's part in a checkpoint: from its start (or from scratch) to the step at which it was saved.

    ``max_lr`` and ``last_lr`` are the highest and the last learning rate it used; ``losses`` its newest validation losses.
    ``left_out``: ranges (first, last) of its steps that are not in the weights: skipped, or given up by going back.
    ``tokenizers``: by which the ids of its data were made, ``eod``: the id that ends their documents, as far as that is known.
    ``goes_on``: it read on from the position of the stage before it in the same data (null: not recorded).
    ``grown``: no training but a growth of ``started_from`` (checkpoint/grow.py), which read no data; ``new_layers``: the
    layers, from 0, that it added. ``new_rows``: the vocabulary's rows (first, stop) that it added.
    ``reset``: its choices in the reset table, ``optimizer``: its kind (null: not recorded).
    ``card``, ``config``: of a foreign checkpoint, its model card's terms and its whole config.json, which an export goes by;
    ``generation``: its generation_config.json.
    ``taught_by``: its teacher, if it had one (null also where that was not recorded).
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    run: str
    intent: str
    started_from: str | None = None
    steps: int = 0
    tokens: int = 0
    schedule: dict[str, Any] | None = None
    max_lr: float | None = None
    last_lr: float | None = None
    data: list[DataSeen] = []
    losses: dict[str, Loss] = {}
    left_out: list[tuple[int, int]] = []
    tokenizers: list[TokenizerIdentity] = []
    eod: int | None = None
    goes_on: bool | None = None
    reset: dict[str, str] | None = None
    optimizer: str | None = None
    card: StatedTerms | None = None
    config: dict[str, Any] | None = None
    generation: dict[str, Any] | None = None
    grown: bool = False
    new_layers: list[int] = []
    new_rows: tuple[int, int] | None = None
    taught_by: TaughtBy | None = None


class Lineage(BaseModel):
    """All stages, oldest first. The last one is the run that wrote the checkpoint."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    stages: list[Stage] = []

    @property
    def tokens(self) -> int:
        """Tokens trained on over all recorded stages; foreign checkpoints count as 0, their past is not recorded."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def optimizers(self) -> list[str]:
        """The kinds of optimizer of the stages, in order, each once, as far as they are recorded."""
        return list(dict.fromkeys(stage.optimizer for stage in self.stages if stage.optimizer))

    @property
    def started_config(self) -> dict[str, Any]:
        """The config.json of the Hugging Face checkpoint that training began with; empty if there was none."""
        return next((stage.config for stage in reversed(self.stages) if stage.config), {})

    @property
    def started_generation(self) -> dict[str, Any]:
        """The generation_config.json of the same checkpoint; empty if it has none."""
        return next((stage.generation or {} for stage in reversed(self.stages) if stage.config), {})

    @property
    def began_in_bf16(self) -> bool:
        """Whether that checkpoint's weights are bf16."""
        return (self.started_config.get("dtype") or self.started_config.get("torch_dtype")) == "bfloat16"

    @property
    def grown_from(self) -> str | None:
        """The smaller checkpoint that the newest stage grew this one from; None if the newest stage was no growth."""
        last = self.stages[-1] if self.stages else None
        return last.started_from if last is not None and last.grown else None

    @property
    def of_vocabulary(self) -> list[Stage]:
        """The stages in which the vocabulary is the newest one's: from the last that added rows on."""
        last = max((i for i, stage in enumerate(self.stages) if stage.new_rows), default=0)
        return self.stages[last:]

    def extended(self, stage: Stage) -> Lineage:
        """This history with one more stage at its end."""
        return Lineage(stages=[*self.stages, stage])

    def lines(self) -> list[str]:
        """One readable line a stage."""
        result = []
        for stage in self.stages:
            data = ", ".join(f"{seen.name} {seen.tokens:,}" for seen in stage.data)
            rate = f", lr up to {stage.max_lr:.3g}, last {stage.last_lr:.3g}" if stage.max_lr is not None else ""
            if stage.grown:
                result.append(f"{stage.run}: {stage.intent}")
                continue
            tokens = f"{stage.tokens:,} tokens ({data})" if stage.data else "tokens not recorded"
            without = sum(last - first + 1 for first, last in stage.left_out)
            gaps = f", {without:,} steps left out" if without else ""
            by = f", {stage.optimizer}" if stage.optimizer else ""
            taught = stage.taught_by
            teacher = "" if taught is None else f", taught by {taught.name} ({taught.kind}, weight {taught.weight:g})"
            result.append(f"{stage.run}: {stage.intent}, {stage.steps:,} steps, {tokens}{by}{rate}{gaps}{teacher}")
        return result
