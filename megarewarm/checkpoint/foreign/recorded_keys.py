"""What a foreign configuration says beside a model's shape: keys that leave the function alone, and all others.

A checkpoint whose configuration names another function is read wrong without a sign if only the shapes are looked at. So
every key is in one of a format's three groups (``Keys``), and what is in none of them has to be off: programs give
a new feature a default that leaves older models as they were, so that checkpoints of newer versions stay readable.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megarewarm.errors import UserError

NO = (None, False, 0)


@dataclass(frozen=True)
class Keys:
    """The keys of a format. ``read``: taken into the model's shape or compared with the tensors. ``only``: what changes the
    function: the values that are the function here, and what another one is. ``harmless``: whole names that change nothing."""

    read: frozenset[str]
    only: Mapping[str, tuple[tuple[Any, ...], str]]
    harmless: re.Pattern[str]
    remedy: str


def names(words: str, *families: str) -> re.Pattern[str]:
    """A pattern for the names in ``words``, and for those that begin with one of ``families``."""
    return re.compile("|".join([*map(re.escape, words.split()), *(f"{re.escape(family)}.*" for family in families)]))


def refuse_other_functions(where: str, given: Mapping[str, Any], keys: Keys) -> None:
    """Raise ``UserError`` naming the first key of ``given`` under which the weights would be another function."""
    for key, value in given.items():
        if key in keys.read:
            continue
        if key in keys.only:
            allowed, reason = keys.only[key]
            if not is_among(value, allowed):
                on = [_shown(item) for item in allowed if not is_off(item)]
                shown = " or ".join(on if on else ["False" if False in allowed else "None"])
                raise UserError(f"{where}: {key} is {_shown(value)}, expected {shown}: {reason}")
        elif not keys.harmless.fullmatch(key) and not is_off(value):
            raise UserError(
                f"{where}: {key} is {_shown(value)}, and what that does to the model is not known here; {keys.remedy}"
            )


def is_among(value: Any, allowed: Iterable[Any]) -> bool:
    """Whether ``value`` is one of ``allowed``; 0 is no False, but a list of what is off is off."""
    if is_off(value) and not isinstance(value, bool) and any(item is None for item in allowed):
        return True
    return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in allowed)


def is_off(value: Any) -> bool:
    """None, False, 0, nothing, or a list or mapping of nothing else."""
    if isinstance(value, Mapping):
        return all(is_off(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(is_off(item) for item in value)
    return value is None or value is False or value == "" or (isinstance(value, int | float) and value == 0)


def require_agreement(where: str, what: str, said: Mapping[str, Any]) -> Any:
    """The one value that all places of ``said`` give for ``what`` (None if none does). Raises ``UserError`` for two."""
    given = {place: value for place, value in said.items() if value is not None}
    first = next(iter(given.items()), None)
    for place, value in given.items():
        if first is not None and value != first[1]:
            raise UserError(
                f"{where}: {what} is {_shown(first[1])} by {first[0]} and {_shown(value)} by {place}: files of two models, or "
                f"a configuration that was changed; make them agree"
            )
    return None if first is None else first[1]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
