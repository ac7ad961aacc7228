"""experiment.json as every reader of it takes it: of a known format, and with run folders that lie in the experiment's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from megarewarm.record.layout import EXPERIMENT_FILE, EXPERIMENT_FORMAT, check_format
from megarewarm.untrusted import is_inside


def read_record(folder: Path) -> dict[str, Any]:
    """The record in an experiment's folder. Raises ``UserError`` for a newer format, else ``ValueError``, ``KeyError``,
    ``TypeError`` or ``AttributeError`` for what is no record: the caller knows what to say of it."""
    path = folder / EXPERIMENT_FILE
    record: dict[str, Any] = orjson.loads(path.read_bytes())
    check_format(record.get("format", 1), EXPERIMENT_FORMAT, path)
    for run in record["runs"]:
        if "folder" in run and not is_inside(run["folder"]):
            raise ValueError(f"the folder of a run is {str(run['folder'])[:80]!r}, outside of this one")
    return record
