"""experiment.json as every reader of it takes it: of a known format, and with run folders that lie in the experiment's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from megarewarm.errors import UserError
from megarewarm.untrusted import is_inside

FILE = "experiment.json"
FORMAT = 1


def read_record(folder: Path) -> dict[str, Any]:
    """The record in an experiment's folder.

    Raises ``UserError`` for a newer format, else ``ValueError``, ``KeyError``, ``TypeError`` or ``AttributeError`` for what is
    no record: the caller knows what to say of it.
    """
    path = folder / FILE
    record: dict[str, Any] = orjson.loads(path.read_bytes())
    found = record.get("format", 1)
    if not isinstance(found, int) or found > FORMAT:
        raise UserError(f"{path}: format {found!r}, this program reads {FORMAT}: use the version that wrote it")
    for run in record["runs"]:
        if "folder" in run and not is_inside(run["folder"]):
            raise ValueError(f"the folder of a run is {str(run['folder'])[:80]!r}, outside of this one")
    return record
