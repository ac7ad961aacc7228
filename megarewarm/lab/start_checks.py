"""Checks a run's start in advance: the start's own checks, as far as the run's files are on this machine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megarewarm.config.data import Source
from megarewarm.config.experiment import Experiment
from megarewarm.config.schema import RunConfig
from megarewarm.data.files.document_table import table_path
from megarewarm.data.files.file_bytes import find_bin
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.tasks.items import PACKAGED, read_tasks
from megarewarm.errors import UserError
from megarewarm.lab.plan_ahead import plan_ahead
from megarewarm.parallel.collective import collective
from megarewarm.parallel.fit import check_fit
from megarewarm.parallel.mesh import choose_layout
from megarewarm.training.finish import is_trained
from megarewarm.training.output.notes import logged_notes
from megarewarm.training.start.evaluation_cost import tokens_asked, tokens_held
from megarewarm.training.start.inputs import check_training, open_inputs
from megarewarm.training.start.micro_batch import settle_micro_batch
from megarewarm.training.start.own_replay import check_own_replay, described, without_replay
from megarewarm.training.start.plan import Plan
from megarewarm.training.start.planned import PlannedCheckpoint
from megarewarm.training.start.tasks import RunTasks
from megarewarm.training.start.texts import settle_texts


@dataclass(frozen=True)
class Checked:
    """``absent``: what is needed but missing, if that is allowed; ``notes``: of the start; ``evaluated``: tokens of one
    evaluation of each validation set, as configured if the sets are missing; ``tasks``: those of ``evaluation``, None where
    they depend on what is missing."""

    absent: list[str]
    notes: list[str]
    evaluated: dict[str, int]
    tasks: RunTasks | None = None

    @property
    def task_tokens(self) -> int:
        """Tokens of one test on the tasks."""
        return 0 if self.tasks is None else self.tasks.tokens


def ranks_of(config: RunConfig, started: int) -> int:
    """The ranks of a run: as many as a launcher ``started``, or for a single process as many as ``parallel`` needs."""
    parallel = config.parallel
    return started if started > 1 else parallel.pipeline * parallel.tensor * (parallel.data or 1)


def prepared_folder(experiment: Experiment) -> Path | None:
    """The folder of the token files that the experiment prepares before its first run; None if it prepares none."""
    return Path(experiment.config.data_folder) if experiment.config.prepare is not None else None


def missing_files(config: RunConfig, prepared: Path | None = None) -> list[str]:
    """A line for each token file and list of documents that is not on this machine, except those below ``prepared``."""
    sources = _sources(config)
    absent = {f"{Path(s.path).absolute()}: no such token file (.bin) here": s.path for s in sources if not _tokens_here(s)}
    for source in sources:
        if source.documents is not None and not table_path(source.documents).is_file():
            absent[f"{table_path(source.documents).absolute()}: no such list of documents here"] = source.documents
    for task in config.evaluation.tasks:
        if not task.startswith(PACKAGED) and not Path(task).is_file():
            absent[f"{Path(task).absolute()}: no such task file here"] = task
    return [line for line, path in absent.items() if not _is_below(path, prepared)]


def check_start(
    plan: Plan,
    world_size: int,
    missing: list[str],
    choose: Callable[[str], torch.device],
    *,
    allow_missing: bool = False,
    prepared: Path | None = None,
) -> Checked:
    """Check the start of ``plan``; ``missing``: lines on a missing start checkpoint.

    Raises the ``UserError`` that the start would raise. Files that an earlier run or ``prepared`` will write are not missing;
    what depends on them can't be checked yet. Opens every file that exists. ``choose``: from ``training.device`` to a device.
    """
    if plan.awaits_replay or waits_for_another(plan):
        if plan.awaits_replay:
            check_own_replay(plan)
            if not isinstance(plan.source, PlannedCheckpoint):
                described(plan)
        plan = without_replay(plan)
    config = plan.config
    absent = [*missing, *missing_files(config, prepared)]
    tokenizer = _missing_tokenizer(config)
    if tokenizer is not None and allow_missing and not _is_below(tokenizer, prepared):
        absent.append(f"{tokenizer.absolute()}: no such tokenizer here")
    device = _device(config, choose, absent, allow_missing)
    plan, _ = settle_micro_batch(plan, world_size, device)
    check_training(plan)
    if missing and not allow_missing:
        raise UserError(missing[0])
    unknown = any(isinstance(each, PlannedCheckpoint) and each.written_by is None for each in (plan.source, plan.teacher))
    later = tokenizer is not None and (allow_missing or _is_below(tokenizer, prepared))
    tasks_here = all(task.startswith(PACKAGED) or Path(task).is_file() for task in config.evaluation.tasks)
    complete = all(map(_is_here, _sources(config))) and tasks_here and not unknown and not later
    evaluated, tasks = tokens_asked(config), None
    with logged_notes() as logged:
        if complete or (absent and not allow_missing):
            inputs = open_inputs(plan, world_size, device)
            notes, evaluated, tasks = inputs.notes, tokens_held(inputs.validation), inputs.tasks
        else:
            notes = check_fit(config, plan.model, choose_layout(config.parallel, world_size), plan.taught_by)
            if not later:
                notes += settle_texts(plan).notes
            files = TokenFiles(config.data, plan.model.vocab_size)
            for source in filter(_is_here, _sources(config)):
                files.view(source)
            read_tasks([task for task in config.evaluation.tasks if Path(task).is_file()])
    return Checked(absent, [*notes, *logged], evaluated, tasks)


def waits_for_another(plan: Plan) -> bool:
    """Whether it replays the lineage of a run whose start has yet to write its own replay."""
    earlier = plan.source.written_by if isinstance(plan.source, PlannedCheckpoint) else None
    replays = plan.config.replay is not None and plan.config.replay.of == "lineage"
    return replays and earlier is not None and (earlier.awaits_replay or waits_for_another(earlier))


@collective
def check_runs(
    configs: Sequence[RunConfig], chosen: Collection[str], world_size: int, choose: Callable[[str], torch.device]
) -> None:
    """Check the start of each run named in ``chosen`` before the first trains, and raise its ``UserError``. A run starts from
    what exists, or from what an earlier one of ``configs`` will have written. All ranks call it."""
    plans: list[Plan] = []
    for config in configs:
        try:
            plan, missing = plan_ahead(config, plans)
            plans.append(plan)
            if config.name in chosen and not is_trained(plan):
                check_start(plan, world_size, missing, choose)
        except UserError as error:
            if config.name in chosen:
                raise UserError(f"run '{config.name}': {error}") from error


def _device(config: RunConfig, choose: Callable[[str], torch.device], absent: list[str], allow_missing: bool) -> torch.device:
    """The device of this process; if it is missing, ``absent`` gets a line."""
    try:
        return choose(config.training.device)
    except UserError as error:
        if not allow_missing:
            raise
        absent.append(str(error))
        return torch.device("cpu")


def _sources(config: RunConfig) -> list[Source]:
    old = config.replay.sources or [] if config.replay is not None else []
    switched = [source for switch in config.data.switches for source in switch.train]
    return [*config.data.train, *switched, *old, *(s for v in config.data.validation for s in v.sources)]


def _is_here(source: Source) -> bool:
    return _tokens_here(source) and (source.documents is None or table_path(source.documents).is_file())


def _tokens_here(source: Source) -> bool:
    return bool(find_bin(source.path.removesuffix(".bin").removesuffix(".idx")))


def _missing_tokenizer(config: RunConfig) -> Path | None:
    """``data.tokenizer`` if it is not on this machine, else None."""
    name = config.data.tokenizer
    return Path(name) if name is not None and not Path(name).exists() else None


def _is_below(path: str | Path, folder: Path | None) -> bool:
    return folder is not None and Path(path).is_relative_to(folder)
