"""The sections of a run against forgetting, beside replay: distillation to the start checkpoint, interpolation with it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megarewarm.config.budget import Share
from megarewarm.config.section import Section


class DistillConfig(Section):
    """A further term of the loss: the distance from the start checkpoint's frozen model, on the training tokens. It costs a
    forward pass of that model a step, and its weights in memory on every rank."""

    kind: Literal["logits", "hidden"] = Field(
        "logits",
        description="logits: the Kullback-Leibler divergence of the predictions from the start's, KL(start || model) per "
        "token. hidden: the mean squared difference of the states after the last norm (arXiv 2210.02871).",
    )
    weight: float = Field(1.0, gt=0, description="Weight of the term beside the cross entropy.")


class InterpolateConfig(Section):
    """Weights between the start checkpoint's and the run's last, (1 - alpha) start + alpha end (arXiv 2109.01903), evaluated on
    every validation set after the last step. The run's checkpoints stay what they are; megarewarm merge writes the
    one that is chosen."""

    alphas: list[Annotated[Share, Field(gt=-1, lt=2)]] = Field(
        [0.2, 0.4, 0.6, 0.8], min_length=1, description="Shares of the end; beyond 0 and 1 it extrapolates."
    )
