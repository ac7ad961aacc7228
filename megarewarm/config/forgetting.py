"""The sections of a run against forgetting, beside replay: distillation from a frozen model, interpolation with the start."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from megarewarm.config.budget import Share
from megarewarm.config.paths import PathText
from megarewarm.config.section import Section


class DistillConfig(Section):
    """A further term of the loss: the distance from a frozen teacher, on the training tokens. It costs a forward pass of the
    teacher a step, and its weights in memory, divided by tensor and pipeline ranks as the model is."""

    from_: PathText | None = Field(
        None,
        alias="from",
        description="The teacher, named as in start.from; its vocabulary is the model's, its shape may differ (kind hidden: "
        "of the same width). In an experiment it may be one of its runs. Null: the start checkpoint, to stay near it.",
    )
    kind: Literal["logits", "hidden"] = Field(
        "logits",
        description="logits: the Kullback-Leibler divergence of the predictions from the teacher's, KL(teacher || model) per "
        "token. hidden: the mean squared difference of the states after the last norm (arXiv 2210.02871, "
        "where it is the sum over the width, at one position).",
    )
    weight: float = Field(1.0, gt=0, description="Weight of the term beside the cross entropy.")

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class InterpolateConfig(Section):
    """Weights between the start checkpoint's and the run's last, (1 - alpha) start + alpha end (arXiv 2109.01903), evaluated on
    every validation set after the last step. The run's checkpoints stay what they are; megarewarm merge writes the
    one that is chosen."""

    alphas: list[Annotated[Share, Field(gt=-1, lt=2)]] = Field(
        [0.2, 0.4, 0.6, 0.8], min_length=1, description="Shares of the end; beyond 0 and 1 it extrapolates."
    )
