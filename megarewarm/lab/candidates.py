"""Checkpoints that a run could start from: what their names mean, whether they read the data, and where in its schedule each
was saved."""

from __future__ import annotations

import fnmatch
import glob
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megarewarm.checkpoint.own.folder import checkpoints_in
from megarewarm.checkpoint.source import OpenedCheckpoint, open_checkpoint, tokenizers_of
from megarewarm.config.arms import step_of_moment
from megarewarm.config.load import read_run_config
from megarewarm.data.files.manifest import made_by, refuse_other_tokenizers
from megarewarm.data.files.token_file import TokenFile
from megarewarm.errors import UserError
from megarewarm.record.layout import CHECKPOINTS, step_name, step_of
from megarewarm.schedules.schedule import Schedule

_WILD = "*?["


@dataclass(frozen=True)
class SavedPhase:
    """Where in its schedule a checkpoint was saved. ``name``: of the phase of its last step; ``share``: that step's rate over
    the peak. None where it is not recorded."""

    name: str | None = None
    share: float | None = None

    def __str__(self) -> str:
        percent = 100 * (self.share or 0.0)
        rate = "" if self.share is None else f"{percent:.0f} %" if percent >= 1 else f"{percent:.1g} %"
        return ", ".join(filter(None, (self.name, rate))) or "not recorded"


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that may become the start. ``name``: what start.from takes; ``label``: for tables and run folders;
    ``step`` and ``tokens`` of its training, None where it is not recorded."""

    name: str
    label: str
    source: OpenedCheckpoint
    phase: SavedPhase
    step: int | None
    tokens: int | None


def find_candidates(names: Sequence[str]) -> list[Candidate]:
    """The checkpoints that ``names`` mean: anything that start.from takes; ``RUN@*`` for all of a run of megarewarm,
    ``RUN@20%`` for one of them; and patterns of folders. Opens them, headers only. Raises ``UserError`` for one that can't be
    read, one that is named twice, and fewer than two."""
    found = [path for name in names for path in _meant(name)]
    if twice := [path for path in dict.fromkeys(found) if found.count(path) > 1]:
        raise UserError(f"{twice[0]}: is given twice; name each candidate once")
    if len(found) < 2:
        raise UserError(f"{found[0]}: is the only candidate; name two or more to choose from (RUN@* for all of a run)")
    labels = _labels(found)
    return [_candidate(path, label) for path, label in zip(found, labels, strict=True)]


def check_reads(candidate: Candidate, files: Sequence[TokenFile]) -> None:
    """Raise ``UserError`` where the ids of ``files`` are of another tokenizer than the candidate's, as far as both are known,
    or beyond its vocabulary."""
    made = [found for file in files if (found := made_by(file.path)) is not None]
    try:
        refuse_other_tokenizers([*made, *(tokenizers_of(candidate.source, made) if made else [])])
        for file in files:
            file.check_vocabulary(candidate.source.model_config.vocab_size)
    except UserError as error:
        raise UserError(f"{candidate.name} can't be compared: {error}") from error


def _meant(name: str) -> list[str]:
    run, at, moment = name.rpartition("@")
    if at and (saved := checkpoints_in(Path(run) / CHECKPOINTS)):
        return _of_run(Path(run), moment, saved)
    if any(mark in name for mark in _WILD) and not Path(name).exists():
        paths = sorted(filter(_is_folder, glob.glob(name)), key=_natural)
        if not paths:
            raise UserError(f"{name}: no folder matches")
        return paths
    return [name]


def _of_run(run: Path, moment: str, saved: Sequence[tuple[int, Path]]) -> list[str]:
    if any(mark in moment for mark in _WILD):
        paths = [str(path) for step, path in saved if fnmatch.fnmatch(str(step), moment)]
        if not paths:
            raise UserError(f"{run}@{moment}: no checkpoint matches; there are steps {_listed(saved)}")
        return paths
    step = step_of_moment(moment, read_run_config(run), str(run))
    if step not in dict(saved):
        raise UserError(f"{run}@{moment}: is step {step:,}, of which there is no checkpoint; there are {_listed(saved)}")
    return [str(run / CHECKPOINTS / step_name(step))]


def _listed(saved: Sequence[tuple[int, Path]]) -> str:
    steps = [f"{step:,}" for step, _ in saved]
    return ", ".join(steps if len(steps) <= 8 else [*steps[:4], "...", *steps[-3:]])


def _is_folder(path: str) -> bool:
    return Path(path).is_dir()


def _natural(path: str) -> tuple[str, int, str]:
    """step_9 before step_10."""
    step = step_of(Path(path).name)
    return (str(Path(path).parent), -1 if step is None else step, path)


def _labels(paths: Sequence[str]) -> list[str]:
    """Short names, each once: RUN@STEP for checkpoints of runs, the last part of other paths, or the whole."""
    short = []
    for path in paths:
        step = step_of(Path(path).name) if Path(path).parent.name == CHECKPOINTS else None
        short.append(f"{Path(path).parent.parent.name}@{step}" if step is not None else Path(path).name)
    return [label if short.count(label) == 1 else path for label, path in zip(short, paths, strict=True)]


def _candidate(path: str, label: str) -> Candidate:
    source = open_checkpoint(path)
    training = source.training
    tokens = source.lineage.tokens or (training.tokens_counted if training is not None else None)
    return Candidate(path, label, source, phase_of(source), training.step if training is not None else None, tokens or None)


def phase_of(source: OpenedCheckpoint) -> SavedPhase:
    """Where in its schedule ``source`` was saved, from its counters, or from the last stage of its lineage that had rates."""
    training = source.training
    stage = next((stage for stage in reversed(source.lineage.stages) if stage.max_lr), None)
    if stage is not None and stage is not source.lineage.stages[-1]:
        return SavedPhase(source.lineage.stages[-1].intent.partition(":")[0])  # merged: the average of several phases
    name = None
    if training is not None and training.schedule_position > 0:
        try:
            name = Schedule.from_spec(training.schedule).phase(training.schedule_position - 1)
        except (UserError, TypeError, KeyError):
            name = None  # another program's
    last = (training.last_lr if training is not None else None) or (stage.last_lr if stage is not None else None)
    share = last / stage.max_lr if last and stage is not None and stage.max_lr else None
    return SavedPhase(name, share if share is not None and math.isfinite(share) else None)
