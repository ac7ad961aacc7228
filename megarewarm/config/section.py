"""What every section of a configuration has in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Positive = Annotated[int, Field(gt=0)]
LearningRate = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what JSON and torch take, with room for a rank's number


def _no_way_out(name: str) -> str:
    if not name.strip("."):
        raise ValueError(f"'{name}' names no folder")
    return name


FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$"), AfterValidator(_no_way_out)]
"""A name after which a folder is called."""


def _types(annotation: Any) -> Iterator[Any]:
    """The types that are named anywhere in an annotation."""
    yield annotation
    for inner in get_args(annotation):
        yield from _types(inner)


class Section(BaseModel):
    """Unknown keys are errors, values are frozen after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes true for 1."""
        if isinstance(value, bool) and (name := info.field_name) is not None:
            taken = set(_types(cls.model_fields[name].annotation))
            if taken & {int, float} and bool not in taken:
                raise ValueError(f"expected a number, not a switch (given: {str(value).lower()})")
        return value
