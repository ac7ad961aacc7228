"""The section of a run that says whether, and against what, its training rows are valued."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal

from pydantic import Field, field_validator

from megarewarm.config.budget import Budget, Interval, Sequences, Share
from megarewarm.config.section import Section


class ValuationConfig(Section):
    """What rows of the training data do to validation losses, measured during the run (In-Run Data Shapley, arXiv 2406.11011,
    with Adam's preconditioner). A positive value lowered the loss. Training itself stays the same, bit for bit."""

    against: list[str] = Field(min_length=1, description="Names of the validation sets whose losses count.")
    every: Interval = Field(
        Budget(amount=20, unit="steps"), description="Interval at which a step's rows are valued.", validate_default=False
    )
    share: Annotated[Share, Field(gt=0, le=1)] = Field(
        0.25, description="Share of the batch's rows that are valued at such a step, drawn at random; at least 4 rows."
    )
    rows: Sequences | None = Field(
        None,
        description="Rows of each validation set that they are valued against, the next ones each time; null: an eighth of "
        "training.global_batch, at least 4.",
    )
    per: Literal["source"] = Field("source", description="What values are summed over in metrics.jsonl: training sources.")
    order: Literal["first"] = Field("first", description="first: the first order of the change of the loss in the step.")
    carry: bool = Field(
        True,
        description="Count what a row does in later steps, too, through Adam's momentum, as if the direction stayed: ten times "
        "as much with a first beta of 0.9. false: in its own step only.",
    )
    keep_extremes: Annotated[int, Field(ge=0)] = Field(
        100, description="Rows with the highest and lowest values of each set whose token ids are kept in RUN/values.jsonl."
    )

    @field_validator("against")
    @classmethod
    def _once(cls, names: list[str]) -> list[str]:
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ValueError(f"validation set '{twice[0]}' is named twice: remove one")
        return names
