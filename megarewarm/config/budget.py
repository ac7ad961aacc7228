"""A length of training, said in the unit its author thinks in: steps, tokens, epochs or a share of the whole run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    WithJsonSchema,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue

Model = TypeVar("Model", bound=BaseModel)

_COUNT = r"^\s*[0-9][0-9_,]*(\.[0-9]+)?\s*[kKmMbBtT]?\s*"  # for the JSON Schema
_EPOCHS = r"^\s*[0-9]+(\.[0-9]+)?\s*(epochs?)\s*$"
Unit = Literal["steps", "tokens", "percent", "epochs"]

_MULTIPLES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_PATTERN = re.compile(
    r"^\s*(?P<number>\d[\d_,]*(?:\.\d+)?(?:e[+-]?\d+)?)\s*(?P<multiple>[kmbt]?)\s*(?P<unit>%|(?:step|token|epoch|sequence|sample|row)s?|)\s*$",
    re.IGNORECASE,
)
_HELP = "write steps as an integer (500), or '500 steps', '2.5B tokens', '2 epochs', or a share of the run as '1%'"
_WORDS: dict[str, Unit] = {"%": "percent", "token": "tokens", "step": "steps", "epoch": "epochs"}
_MOST_STEPS = 10**8  # that are taken for steps where nothing says so: 5e9 is what people write for tokens


def _read(text: str) -> tuple[float, str, str] | None:
    """(amount, unit without a plural's s, multiple) of '2.5B tokens'; None where ``text`` is of another form."""
    match = _PATTERN.match(text)
    if match is None:
        return None
    multiple = match["multiple"].lower()
    number = float(re.sub("[_,]", "", match["number"])) * _MULTIPLES[multiple]
    return number, match["unit"].lower().removesuffix("s"), multiple


def _exactly(amount: float) -> str:
    """The shortest text that reads back as the same number: a length of 1323.66 steps must survive being written."""
    if amount == int(amount):
        return str(int(amount))
    return f"{amount:g}" if float(f"{amount:g}") == amount else repr(amount)


class Budget(BaseModel):
    """``500`` (steps), ``"500 steps"``, ``"2.5B tokens"``, ``"2 epochs"`` (of the new data) or ``"1%"`` (of the run's training
    budget)."""

    model_config = ConfigDict(frozen=True)

    amount: float
    unit: Unit

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if isinstance(value, Budget) or (isinstance(value, dict) and set(value) == {"amount", "unit"}):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError(f"not a length of training; {_HELP}")
        if isinstance(value, int | float):
            if not math.isfinite(value) or value != int(value):
                raise ValueError(f"{value} is not a whole number of steps; {_HELP}")
            value = str(int(value))
        read = _read(value)
        if read is None or read[1] not in ("", *_WORDS):
            raise ValueError(f"'{value}' is not a length of training; {_HELP}")
        amount, word, multiple = read
        if not word and (multiple == "k" or (not multiple and amount >= _MOST_STEPS)):
            raise ValueError(f"'{value}' may be steps or tokens: write '{value.strip()} steps' or '{value.strip()} tokens'")
        if not word and not multiple and amount != int(amount):
            raise ValueError(f"{value} is not a whole number of steps; {_HELP}")
        unit = _WORDS[word] if word else "tokens" if multiple else "steps"
        return {"amount": amount, "unit": unit}

    @model_validator(mode="after")
    def _check(self) -> Budget:
        if not math.isfinite(self.amount) or self.amount < 0:
            raise ValueError("a length of training can't be negative or infinite")
        return self

    @model_serializer
    def _text(self) -> int | str:
        whole = self.unit == "steps" and self.amount == int(self.amount) < _MOST_STEPS
        return int(self.amount) if whole else str(self)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {
            "description": cls.__doc__ or "",
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {
                    "type": "string",
                    "pattern": rf"{_COUNT}(%|steps?|tokens?|epochs?|)\s*$",
                },
            ],
        }

    def __str__(self) -> str:
        if self.unit == "percent":
            return f"{_exactly(self.amount)}%"
        if self.unit in ("steps", "epochs"):
            return f"{_exactly(self.amount)} {self.unit[:-1] if self.unit == 'epochs' and self.amount == 1 else self.unit}"
        for multiple, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
            if self.amount >= size and math.isclose(float(f"{self.amount / size:.6g}") * size, self.amount, rel_tol=0):
                return f"{self.amount / size:.6g}{multiple} tokens"
        return f"{int(self.amount)} tokens"

    def in_steps(self, tokens_per_step: int, total_steps: int | None = None) -> float:
        """The length in optimizer steps, unrounded.

        ``tokens_per_step`` is the global batch in tokens; ``total_steps`` the length of the whole run, which a
        percentage refers to. Raises ``ValueError`` for a percentage with no whole to be a share of, and for epochs.
        """
        if self.unit == "epochs":
            raise ValueError(f"{self} has no length before the training data are counted")
        if self.unit == "steps":
            return self.amount
        if self.unit == "tokens":
            return self.amount / tokens_per_step
        if total_steps is None:
            raise ValueError(f"{self} is a share of the training budget, which itself must be steps or tokens")
        return self.amount / 100 * total_steps

    def exactly_in_steps(self, tokens_per_step: int, total_steps: int) -> Fraction:
        """The same without any rounding: 33.3% is 333 thousandths."""
        amount = Fraction(repr(self.amount))
        whole = {"steps": Fraction(1), "tokens": Fraction(1, tokens_per_step), "percent": Fraction(total_steps, 100)}
        return amount * whole[self.unit]


def _no_nothing(budget: Budget) -> Budget:
    if not budget.amount:
        raise ValueError("0 is no interval: write null for never, 1 for every step")
    return budget


def _count_of(unit: str, example: str, *other: str) -> Any:
    """Reads a number of ``unit`` ('step'), which has ``other`` names too, written as a number or text, with or without it."""

    def read(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = _read(value)
        if found is None or found[1] not in ("", unit, *other) or not found[0].is_integer():
            raise ValueError(f"'{value}' is not a number of {unit}s; write it as 1000 or '{example}'")
        return int(found[0])

    return BeforeValidator(read)


def share(value: Any) -> Any:
    """0.05 of '5%'; what is no share in percent as it is."""
    found = _read(value) if isinstance(value, str) else None
    return found[0] / 100 if found is not None and found[1] == "%" and not found[2] else value


def _epochs(value: Any) -> Any:
    found = _read(value) if isinstance(value, str) else None
    return found[0] if found is not None and found[1] == "epoch" else value


def _as_tokens(value: Any) -> Any:
    """A bare number where only tokens can be meant."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value} tokens"
    found = _read(value) if isinstance(value, str) else None
    return f"{value.strip()} tokens" if found is not None and not found[1] else value


Interval = Annotated[Budget, AfterValidator(_no_nothing)]
"""What lies between two evaluations, checkpoints, ...: above 0. Never is null."""


def _or_text(kind: dict[str, Any], pattern: str) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [kind, {"type": "string", "pattern": pattern}]})


_INTEGER = {"type": "integer", "minimum": 1}
_FROM_0 = {"type": "integer", "minimum": 0}
Steps = Annotated[int, _count_of("step", "50 steps"), Field(gt=0), _or_text(_INTEGER, _COUNT + r"(steps?)?\s*$")]
"""A number of steps: 50 or '50 steps'."""
Step = Annotated[int, _count_of("step", "2k steps"), Field(ge=0), _or_text(_FROM_0, _COUNT + r"(steps?)?\s*$")]
"""A step, counted from 0."""
Tokens = Annotated[int, _count_of("token", "2M tokens"), Field(gt=0), _or_text(_INTEGER, _COUNT + r"(tokens?)?\s*$")]
"""A number of tokens: 2000000, '2M' or '2M tokens'."""
Sequences = Annotated[
    int,
    _count_of("sequence", "512 sequences", "sample"),
    Field(gt=0),
    _or_text(_INTEGER, _COUNT + r"((sequence|sample)s?)?\s*$"),
]
"""A number of sequences, which are samples: 512, '512 sequences' or '512 samples'."""
Row = Annotated[int, _count_of("row", "1.5M"), Field(ge=0), _or_text(_FROM_0, _COUNT + r"(rows?)?\s*$")]
"""A row, counted from 0."""
Epochs = Annotated[float, BeforeValidator(_epochs), Field(gt=0), _or_text({"type": "number", "exclusiveMinimum": 0}, _EPOCHS)]
"""How often data are read through: 2.5 or '2.5 epochs'."""
TokenAmount = Annotated[Budget, BeforeValidator(_as_tokens), _or_text(_INTEGER, _COUNT + r"(tokens?)?\s*$")]
"""A length where only tokens make sense: '2B', 2000000000 and '2B tokens' are the same."""
Share = Annotated[float, BeforeValidator(share), _or_text({"type": "number"}, r"^\s*[0-9][0-9_,]*(\.[0-9]+)?\s*%\s*$")]
"""A share: 0.05 or '5%'."""


def in_epochs(section: BaseModel, path: str = "") -> Iterator[str]:
    """The dotted keys below ``section`` whose lengths are in epochs."""
    for name, value in section:
        if isinstance(value, Budget):
            yield from [path + name] if value.unit == "epochs" else []
        elif isinstance(value, BaseModel):
            yield from in_epochs(value, f"{path}{name}.")


def without_epochs(section: Model, steps: Fraction) -> Model:
    """``section`` with every length in epochs, of ``steps`` each, in steps."""
    changed: dict[str, Any] = {}
    for name, value in section:
        if isinstance(value, Budget) and value.unit == "epochs":
            changed[name] = Budget(amount=float(Fraction(repr(value.amount)) * steps), unit="steps")
        elif isinstance(value, BaseModel) and next(in_epochs(value), None) is not None:
            changed[name] = without_epochs(value, steps)
    return section.model_copy(update=changed) if changed else section
