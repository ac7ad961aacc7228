"""What every section of a configuration has in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
LearningRate = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what JSON and torch take, with room for a rank's number


def _no_way_out(name: str) -> str:
    if not name.strip("."):
        raise ValueError(f"'{name}' names no folder")
    return name


FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$"), AfterValidator(_no_way_out)]
"""A name after which a folder is called."""


class Section(BaseModel):
    """Unknown keys are errors, values are frozen after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
