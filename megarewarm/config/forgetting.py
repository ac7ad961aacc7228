"""The sections of a run against forgetting, beside replay: distillation to the start checkpoint."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

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
