"""What the start of a run would be refused for, found ahead of it: by the start's own checks, as far as its files are here."""

from __future__ import annotations

from pathlib import Path

import torch

from megarewarm.config.data import Source
from megarewarm.config.experiment import Experiment
from megarewarm.config.schema import RunConfig
from megarewarm.data.file_bytes import find_bin
from megarewarm.data.mixture import open_view
from megarewarm.errors import UserError
from megarewarm.parallel.connect import choose_device
from megarewarm.parallel.fit import check_fit
from megarewarm.parallel.launchers import Launch
from megarewarm.parallel.mesh import choose_layout
from megarewarm.training.inputs import check_training, open_inputs
from megarewarm.training.plan import Plan
from megarewarm.training.texts import settle_texts
from megarewarm.training.unwritten import NotOpened


def ranks_of(config: RunConfig, started: int) -> int:
    """The ranks of a run: those that a launcher ``started``; of a single process, as many as ``parallel`` needs."""
    parallel = config.parallel
    return started if started > 1 else parallel.pipeline * parallel.tensor * (parallel.data or 1)


def prepared_folder(experiment: Experiment) -> Path | None:
    """Where the experiment makes token files of its own before its first run."""
    return Path(experiment.config.data_folder) if experiment.config.prepare is not None else None


def missing_files(config: RunConfig, prepared: Path | None = None) -> list[str]:
    """A line for each token file of the run that is not on this machine, but for those to be ``prepared``."""
    sources = [source for source in _sources(config) if not _is_here(source) and not _is_below(source, prepared)]
    return list(dict.fromkeys(f"{Path(source.path).absolute()}: no such token file (.bin) here" for source in sources))


def check_start(
    plan: Plan,
    world_size: int,
    missing: list[str],
    launch: Launch,
    *,
    allow_missing: bool = False,
    prepared: Path | None = None,
) -> tuple[list[str], list[str]]:
    """(What is not here and needed, ``missing`` (of the start checkpoint) among it, where ``allow_missing``, else []; notes).

    Raises the ``UserError`` of the start, whatever it is. What an earlier run or ``prepared`` will write is not missing; what
    depends on it can't be checked yet. Every file that is here is opened.
    """
    config = plan.config
    absent = [*missing, *missing_files(config, prepared)]
    device = _device(config, launch, absent, allow_missing)
    check_training(plan)
    if missing and not allow_missing:
        raise UserError(missing[0])
    unknown = isinstance(plan.source, NotOpened) and plan.source.written_by is None
    complete = all(map(_is_here, _sources(config))) and not unknown
    if complete or (absent and not allow_missing):
        return absent, open_inputs(plan, world_size, device).notes
    fit = check_fit(config, plan.model, choose_layout(config.parallel, world_size))
    notes = _texts(plan, absent, prepared, allow_missing)
    for source in filter(_is_here, _sources(config)):
        open_view(source, config.data, plan.model.vocab_size)
    return absent, [*fit, *notes]


def _texts(plan: Plan, absent: list[str], prepared: Path | None, allow_missing: bool) -> list[str]:
    """The notes on tokenizers; ``absent`` gets the line for one that isn't here, unless it is to be ``prepared``."""
    name = plan.config.data.tokenizer
    waits = name is not None and prepared is not None and Path(name).is_relative_to(prepared)
    try:
        return settle_texts(plan).notes
    except UserError as error:
        if name is None or Path(name).exists() or not (waits or allow_missing):
            raise
        absent.extend([] if waits else [str(error)])
        return []


def _device(config: RunConfig, launch: Launch, absent: list[str], allow_missing: bool) -> torch.device:
    """The device of this process; ``absent`` gets the line for one that isn't here."""
    try:
        return choose_device(launch, config.training.device)
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
    return bool(find_bin(source.path.removesuffix(".bin").removesuffix(".idx")))


def _is_below(source: Source, folder: Path | None) -> bool:
    return folder is not None and Path(source.path).is_relative_to(folder)
