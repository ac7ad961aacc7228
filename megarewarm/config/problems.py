"""What pydantic finds wrong with a value, in the words of whoever wrote it, with what is expected instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megarewarm.errors import nearest

_BOUNDS = {"greater_than": ("gt", "above"), "greater_than_equal": ("ge", "at least"), "less_than": ("lt", "below")} | {
    "less_than_equal": ("le", "at most")
}
_NUMBER = "expected a number, such as 0.1 or 3e-4"
_WHOLE = "expected a whole number, such as 16"
_WORDS = {
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_parsing_size": _WHOLE,
    "int_from_float": _WHOLE,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": "expected a finite number",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "string_pattern_mismatch": "expected a name of letters, digits, '_', '-' and '.', such as run_1",
}


def in_words(item: Mapping[str, Any], keys: Sequence[str]) -> str:
    """One of pydantic's errors as a sentence. ``keys``: those that the schema knows below the place, if it is a section's."""
    kind, value, context = item["type"], item.get("input"), item.get("ctx") or {}
    given = _given(value)
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"expected keys below it, such as {{{keys[0] if keys else 'key'}: ...}}{given}"
    if kind in ("list_type", "tuple_type"):
        return f"expected a list, such as {f'[{{{keys[0]}: ...}}]' if keys else '[1, 2]'}{given}"
    if kind in ("too_short", "too_long"):
        bound = f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
        return f"expected {bound} in the list, found {context['actual_length']}"
    if kind == "string_type":
        quoted = f"; put it in quotes: '{value}'" if isinstance(value, int | float) else ""
        return f"expected text{given}{quoted}"
    if kind == "literal_error":
        choices = str(context.get("expected", "")).replace(" or ", ", ").split(", ")
        hint = nearest(value, [choice.strip("'") for choice in choices]) if isinstance(value, str) else ""
        return f"expected {context.get('expected')}{given}{hint}"
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"must be {words} {context[name]:g}{given}"
    if kind in _WORDS:
        return f"{_WORDS[kind]}{given}"
    return f"{str(item['msg']).removeprefix('Value error, ')}{given}"


def _given(value: Any) -> str:
    if value is None:
        return " (given: null)"
    if isinstance(value, bool):
        return f" (given: {str(value).lower()})"
    return f" (given: {value!r})" if isinstance(value, str | int | float) else ""
