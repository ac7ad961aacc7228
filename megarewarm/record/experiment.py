"""experiment.json as every reader of it takes it: of a known format, and with run folders that lie in the experiment's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from megarewarm.errors import UserError
from megarewarm.untrusted import is_inside

FILE = "experiment.json"
FORMAT = 1
RUN_FORMAT = 1  # of config.yaml and metrics.jsonl


def check_format(found: object, known: int, path: Path) -> None:
    """Raise ``UserError`` for the version ``found`` of a file where it is newer than ``known``."""
    if not isinstance(found, int) or found > known:
        raise UserError(f"{path}: format {found!r}, this program reads {known}: use the version that wrote it")


def read_record(folder: Path) -> dict[str, Any]:
    """The record in an experiment's folder.

    Raises ``UserError`` for a newer format, else ``ValueError``, ``KeyError``, ``TypeError`` or ``AttributeError`` for what is
    no record: the caller knows what to say of it.
    """
    path = folder / FILE
    record: dict[str, Any] = orjson.loads(path.read_bytes())
    check_format(record.get("format", 1), FORMAT, path)
    for run in record["runs"]:
        if "folder" in run and not is_inside(run["folder"]):
            raise ValueError(f"the folder of a run is {str(run['folder'])[:80]!r}, outside of this one")
    return record
