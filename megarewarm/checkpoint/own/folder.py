"""The folder of a run's checkpoints: its checkpoints, the newest intact one, and removal after a save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megarewarm.checkpoint.own.integrity import SUMS_FILE, find_damage
from megarewarm.checkpoint.own.retention import Retention
from megarewarm.checkpoint.own.state import STATE_FILE, TrainingState, read_state
from megarewarm.checkpoint.own.store import PARTIAL, remove, set_aside
from megarewarm.errors import UserError
from megarewarm.parallel.agreement import gather
from megarewarm.parallel.collective import collective
from megarewarm.record.layout import CHECKPOINTS, step_of


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints in ``RUN/checkpoints``, oldest first. Their files are not looked at."""
    if not folder.is_dir():
        return []
    return sorted((n, entry) for entry in folder.iterdir() if (n := step_of(entry.name)) is not None and entry.is_dir())


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a native checkpoint, intact or not."""
    return (path / STATE_FILE).is_file() or (path / SUMS_FILE).is_file()


@collective
def newest_whole(
    folder: Path, *, alone: bool = False, up_to: int | None = None, counts: Callable[[Path], bool] = lambda _: True
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in ``folder`` of which every byte is as it was written, and a note on each that was passed over.

    ``up_to``: the latest step that counts; ``counts``: whether a checkpoint does. None if there are no checkpoints. All
    ranks call it, unless ``alone``. Raises ``UserError`` if there are some and all are damaged, and where the ranks see
    different ones.
    """
    found = [(step, path) for step, path in checkpoints_in(folder) if (up_to is None or step <= up_to) and counts(path)]
    steps = [step for step, _ in found]
    seen = [steps] if alone else gather(steps)
    if any(other != steps for other in seen):
        raise UserError(
            f"{folder}: the ranks see different checkpoints (steps {steps} here); the run folder must lie on a file system "
            f"that all hosts share"
        )
    damages: list[str] = []
    for step, checkpoint in reversed(found):
        unsummed = _is_older_than_checksums(checkpoint)
        damage = None if unsummed else find_damage(checkpoint, alone=alone)
        if damage is None:
            told = [f"{checkpoint} was written before checkpoints had checksums: it can't be verified"] if unsummed else []
            return checkpoint, [f"{why}: the checkpoint of step {step} is used" for why in damages] + told
        damages.append(damage)
    if damages:
        raise UserError(f"{damages[0]}, and no older checkpoint in {folder} is whole; remove the folder to start over")
    return None, []


def _is_older_than_checksums(checkpoint: Path) -> bool:
    """Format 1 had none. Every rank reads the same two files of the same folder."""
    if (checkpoint / SUMS_FILE).exists():
        return False
    try:
        return read_state(checkpoint).format < 2
    except UserError:
        return False


def locate(path: Path, *, alone: bool = False) -> tuple[Path | None, list[str]]:
    """The native checkpoint that ``path`` means: itself, or the newest intact one of a run folder, with notes as above."""
    if is_checkpoint(path):
        return path, []
    for folder in (path, path / CHECKPOINTS):
        if checkpoints_in(folder):
            return newest_whole(folder, alone=alone)
    return None, []


def remove_superseded(folder: Path, step: int, retention: Retention, *, replaced: int | None = None) -> None:
    """Remove checkpoints that retention does not keep, of a run at ``step``. One process calls it. Raises ``OSError``.

    Checkpoints of later steps are damaged ones that a roll-back has left: they are removed as well, except one that is about
    to be ``replaced``, which stays the newest until then.
    """
    for leftover in folder.glob(f"*{PARTIAL}"):
        remove(leftover)
    found = dict(checkpoints_in(folder))
    states = {s: _state(path) for s, path in found.items() if s <= step}
    losses = {s: None if state is None else state.measured.get(retention.best_on or "") for s, state in states.items()}
    interim = frozenset(s for s, state in states.items() if state is not None and state.interim)
    staying = retention.staying(losses, interim)
    for other, checkpoint in found.items():
        if other not in staying and other != replaced:
            doomed = checkpoint.with_name(checkpoint.name + PARTIAL)
            set_aside(checkpoint, doomed)
            remove(doomed)


def _state(checkpoint: Path) -> TrainingState | None:
    """None if it can't be read."""
    try:
        return read_state(checkpoint)
    except UserError:
        return None
