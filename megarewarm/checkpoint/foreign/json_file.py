"""JSON files of other programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megarewarm.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ``UserError`` for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.absolute()}: no such file; expected a Hugging Face model folder") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


Kind = tuple[str, Callable[[Any], bool]]
"""What a value is called, and whether one is of this kind."""
WHOLE: Kind = ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53)
NUMBER: Kind = (
    "a number",
    lambda value: isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value < 1e30,
)
FLAG: Kind = ("true or false", lambda value: isinstance(value, bool))
LIST: Kind = ("a list", lambda value: isinstance(value, list))
MAPPING: Kind = ("a mapping", lambda value: isinstance(value, dict))


def require_kinds(where: str, given: Mapping[str, Any], kinds: Mapping[Kind, str]) -> None:
    """Raise ``UserError`` naming the first key of ``given`` that is not of its kind; null and keys left out are."""
    for (words, is_one), keys in kinds.items():
        for key in keys.split():
            if (value := given.get(key)) is not None and not is_one(value):
                shown = repr(value)
                raise UserError(f"{where}: {key} is {shown if len(shown) <= 80 else f'{shown[:77]}...'}, expected {words}")


def first_line(error: BaseException) -> str:
    """A one-line version of another library's error message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
