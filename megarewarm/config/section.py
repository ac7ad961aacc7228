"""What every section of a configuration has in common."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticKnownError
from pydantic_core.core_schema import no_info_before_validator_function

Positive = Annotated[int, Field(gt=0)]
LearningRate = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what JSON and torch take, with room for a rank's number


def _no_way_out(name: str) -> str:
    if not name.strip("."):
        raise ValueError(f"'{name}' names no folder")
    return name


FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$"), AfterValidator(_no_way_out)]
"""A name after which a folder is called."""


class OneOf:
    """Of a text: one of ``names``, as ``Literal`` says it; a table that grows later may be given."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = names

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return no_info_before_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"enum": list(self.names), "type": "string"}

    def _check(self, value: Any) -> Any:
        if isinstance(value, str) and value in self.names:
            return value
        *names, last = map(repr, self.names)
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(names)} or {last}"})


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
                raise ValueError("expected a number, not a switch")
        return value
