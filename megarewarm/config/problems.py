"""pydantic's complaints about a value in terms of the YAML, with what is expected instead."""

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


def in_words(items: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """What pydantic says of one value, once for each thing that it may be, as a sentence. ``keys``: those that the schema knows
    below the place, if it is a section's."""
    said = [_in_words(item, keys) for item in items]
    first, *others = dict.fromkeys(expected for expected, _ in said)
    expected = ", or ".join([first, *(other.removeprefix("expected ") for other in others)])
    given = "" if items[0]["type"] == "missing" else _given(items[0].get("input"))
    return f"{expected}{given}{''.join(hint for _, hint in said)}"


def _in_words(item: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, str]:
    """(what is wrong or expected, a hint that follows what was given)."""
    kind, value, context = item["type"], item.get("input"), item.get("ctx") or {}
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"expected keys below it, such as {{{keys[0] if keys else 'key'}: ...}}", ""
    if kind in ("list_type", "tuple_type"):
        return f"expected a list, such as {f'[{{{keys[0]}: ...}}]' if keys else '[1, 2]'}", ""
    if kind in ("too_short", "too_long"):
        bound = f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
        return f"expected {bound} in the list, found {context['actual_length']}", ""
    if kind == "missing":  # the item of a list of some length
        return f"expected at least {item['loc'][-1] + 1} in the list, found {item['loc'][-1]}", ""
    if kind == "string_type":
        return "expected text", f"; put it in quotes: '{value}'" if isinstance(value, int | float) else ""
    if kind == "literal_error":
        choices = str(context.get("expected", "")).replace(" or ", ", ").split(", ")
        hint = nearest(value, [choice.strip("'") for choice in choices]) if isinstance(value, str) else ""
        return f"expected {context.get('expected')}", hint
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"must be {words} {context[name]:g}", ""
    return _WORDS.get(kind) or str(item["msg"]).removeprefix("Value error, "), ""


def _given(value: Any) -> str:
    if value is None:
        return " (given: null)"
    if isinstance(value, bool):
        return f" (given: {str(value).lower()})"
    return f" (given: {value!r})" if isinstance(value, str | int | float) else ""
