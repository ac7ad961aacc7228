"""A length of training, said in the unit its author thinks in: steps, tokens or a share of the whole run."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_serializer, model_validator
from pydantic.json_schema import JsonSchemaValue

Unit = Literal["steps", "tokens", "percent"]

_MULTIPLES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_PATTERN = re.compile(
    r"^\s*(?P<number>\d[\d_,]*(?:\.\d+)?(?:e[+-]?\d+)?)\s*(?P<multiple>[kmbt]?)\s*(?P<unit>%|steps?|tokens?)\s*$",
    re.IGNORECASE,
)
_HELP = "write steps as an integer (500), or '500 steps', '2.5B tokens', or a share of the run as '1%'"


def _exactly(amount: float) -> str:
    """The shortest text that reads back as the same number: a length of 1323.66 steps must survive being written."""
    if amount == int(amount):
        return str(int(amount))
    return f"{amount:g}" if float(f"{amount:g}") == amount else repr(amount)


class Budget(BaseModel):
    """``500`` (steps), ``"500 steps"``, ``"2.5B tokens"`` or ``"1%"`` (of the run's training budget)."""

    model_config = ConfigDict(frozen=True)

    amount: float
    unit: Unit

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if isinstance(value, Budget | dict):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError(f"not a length of training; {_HELP}")
        if isinstance(value, int | float):
            if value != int(value):
                raise ValueError(f"{value} is not a whole number of steps; {_HELP}")
            value = f"{int(value)} steps"
        match = _PATTERN.match(value)
        if match is None and re.fullmatch(r"\s*\d[\d_]*\s*", value):
            match = _PATTERN.match(value + " steps")
        if match is None:
            raise ValueError(f"'{value}' is not a length of training; {_HELP}")
        amount = float(re.sub("[_,]", "", match["number"])) * _MULTIPLES[match["multiple"].lower()]
        word = match["unit"].lower()
        unit: Unit = "percent" if word == "%" else "steps" if word.startswith("step") else "tokens"
        return {"amount": amount, "unit": unit}

    @model_validator(mode="after")
    def _check(self) -> Budget:
        if not math.isfinite(self.amount) or self.amount < 0:
            raise ValueError("a length of training can't be negative or infinite")
        return self

    @model_serializer
    def _text(self) -> int | str:
        return int(self.amount) if self.unit == "steps" and self.amount == int(self.amount) else str(self)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {
            "description": cls.__doc__ or "",
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "string", "pattern": r"^\s*[0-9][0-9_,]*(\.[0-9]+)?\s*[kKmMbBtT]?\s*(%|steps?|tokens?)\s*$"},
            ],
        }

    def __str__(self) -> str:
        if self.unit == "percent":
            return f"{_exactly(self.amount)}%"
        if self.unit == "steps":
            return f"{_exactly(self.amount)} steps"
        for multiple, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
            if self.amount >= size and math.isclose(float(f"{self.amount / size:.6g}") * size, self.amount, rel_tol=0):
                return f"{self.amount / size:.6g}{multiple} tokens"
        return f"{int(self.amount)} tokens"

    def in_steps(self, tokens_per_step: int, total_steps: int | None = None) -> float:
        """The length in optimizer steps, unrounded.

        ``tokens_per_step`` is the global batch in tokens; ``total_steps`` the length of the whole run, which a
        percentage refers to. Raises ``ValueError`` for a percentage with no whole to be a share of.
        """
        if self.unit == "steps":
            return self.amount
        if self.unit == "tokens":
            return self.amount / tokens_per_step
        if total_steps is None:
            raise ValueError(f"{self} is a share of the training budget, which itself must be steps or tokens")
        return self.amount / 100 * total_steps
