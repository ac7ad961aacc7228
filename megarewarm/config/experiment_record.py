"""experiment.json in an experiment's folder: its runs and how they belong together, for readers of the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megarewarm.config.experiment import Experiment
from megarewarm.errors import UserError
from megarewarm.files import write_whole
from megarewarm.record.layout import EXPERIMENT_FILE, EXPERIMENT_FORMAT, METRICS_FILE


def record_of(experiment: Experiment) -> dict[str, Any]:
    """What the file says: names, groups, axes, seeds, chains, folders (relative), what each run waits for and what of it only
    teaches it, and its length."""
    return {
        "format": EXPERIMENT_FORMAT,
        "experiment": experiment.config.experiment,
        "title": experiment.config.title,
        "runs": [
            {
                "name": arm.name,
                "arm": arm.arm,
                "seed": arm.seed,
                "group": arm.group,
                "groups": arm.groups,
                "axes": arm.axes,
                "chain": arm.chain,
                "stage": arm.stage,
                "folder": arm.folder,
                "after": list(arm.after),
                "taught_by": list(arm.taught_by),
                "steps": arm.config.total_steps,
                "tokens_per_step": arm.config.tokens_per_step,
            }
            for arm in experiment.arms
        ],
    }


def check_record(experiment: Experiment) -> None:
    """Raise ``UserError`` where the folder is another experiment's, or no folder."""
    folder = Path(experiment.folder)
    path = folder / EXPERIMENT_FILE
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: the experiment's folder is a file; set 'folder' to another place")
    if (folder / METRICS_FILE).exists():
        raise UserError(f"{folder}: holds a single run, not an experiment; set 'experiment' or 'folder' to another name")
    if not path.is_file():
        return
    try:
        other = json.loads(path.read_text(encoding="utf-8"))["experiment"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged; remove it (it is written again), or set 'folder' to another place") from None
    if other != experiment.config.experiment:
        raise UserError(
            f"{folder}: holds the experiment '{other}', this one is '{experiment.config.experiment}'; set 'folder' to another "
            f"place"
        )


def write_record(experiment: Experiment) -> Path:
    """Write the file, whole or not at all. Raises ``UserError`` as ``check_record``, and where it can't be written."""
    check_record(experiment)
    path = Path(experiment.folder) / EXPERIMENT_FILE
    try:
        write_whole(path, f"{json.dumps(record_of(experiment), indent=1)}\n".encode())
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error}); set 'folder' to another place") from error
    return path
