"""Whether two resolved configurations define the same run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megarewarm.config.schema import RunConfig

# The sections that define a run. The others (logging, checkpoint, evaluation, ...) may change between restarts.
_IDENTITY = ("name", "model", "context", "start", "data", "replay", "distill", "schedule", "training", "optimizer")
_FREE = {
    ("training", "micro_batch"),
    ("training", "device"),
    ("training", "precision"),
    ("training", "recompute"),
    ("data", "tokenizer"),
}


def difference_of_runs(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """(key, old value, new value) of the first difference that makes two configurations those of different runs, or None."""
    one, other = _completed(old), _completed(new)
    return first_difference({k: one.get(k) for k in _IDENTITY}, {k: other.get(k) for k in _IDENTITY})


def _completed(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration of an earlier version, with the defaults of keys that it did not have."""
    try:
        complete = RunConfig.model_validate(settings).model_dump(mode="json", by_alias=True)
    except ValidationError:
        return settings  # the message then names the difference
    if complete["start"]["moments"] != "measure":
        del complete["start"]["measure_batches"]  # says nothing
    return complete


def first_difference(old: Any, new: Any, path: tuple[str, ...] = ()) -> tuple[str, Any, Any] | None:
    """(key, old value, new value) of the first difference between two nested configurations, or None."""
    if path in _FREE:
        return None
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            if found := first_difference(old.get(key), new.get(key), (*path, str(key))):
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (left, right) in enumerate(zip(old, new, strict=True)):
            if found := first_difference(left, right, (*path, str(i))):
                return found
        return None
    return None if old == new else (".".join(path), old, new)
