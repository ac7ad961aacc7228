"""The version of a run folder: ``format`` in config.yaml and in the start lines of metrics.jsonl. Without one it is 1."""

from __future__ import annotations

from typing import Any

from megarewarm.errors import UserError

RUN_FORMAT = 1


def take_format(mapping: dict[str, Any], file: str) -> dict[str, Any]:
    """``mapping`` without its key 'format'. Raises ``UserError`` where that is newer than this program."""
    if "format" not in mapping:
        return mapping
    found = mapping["format"]
    if not isinstance(found, int) or found > RUN_FORMAT:
        raise UserError(f"{file}: format {found!r} is not one that this megarewarm reads ({RUN_FORMAT}); update megarewarm")
    return {key: value for key, value in mapping.items() if key != "format"}
