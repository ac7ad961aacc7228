"""Names and versions of the files in a run folder and in an experiment's folder, for the trainer and all readers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megarewarm.errors import UserError

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
LOG_FILE = "log.txt"
VALUES_FILE = "values.jsonl"
CHECKPOINTS = "checkpoints"
BATCHES = "batches"
EXPORT = "huggingface"
AVERAGE = "average"
TENSORBOARD = "tensorboard"
RUN_FORMAT = 1
"""``format`` in config.yaml and in the start lines of metrics.jsonl. Without one it is 1."""

EXPERIMENT_FILE = "experiment.json"
EXPERIMENT_FORMAT = 1

_STEP = "step_"


def step_name(step: int) -> str:
    """The name of the checkpoint and of the batch file of ``step``, without an ending."""
    return f"{_STEP}{step}"


def step_of(name: str) -> int | None:
    """The step whose name ``name`` is; None for any other name."""
    digits = name.removeprefix(_STEP)
    return int(digits) if name.startswith(_STEP) and digits.isascii() and digits.isdecimal() else None


def check_format(found: object, known: int, path: Path) -> None:
    """Raise ``UserError`` for the version ``found`` of a file where it is newer than ``known``."""
    if not isinstance(found, int) or found > known:
        raise UserError(f"{path}: format {found!r}, this program reads {known}: use the version that wrote it")


def take_format(mapping: dict[str, Any], path: Path) -> dict[str, Any]:
    """The mapping of a run's configuration without its key 'format'. Raises ``UserError`` if that is newer than known."""
    check_format(mapping.get("format", 1), RUN_FORMAT, path)
    return {key: value for key, value in mapping.items() if key != "format"}
