"""Run an experiment: prepare its data, train its runs one after another, write the report. Finished work is kept."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import TaskID

from megarewarm.config.arms import Arm
from megarewarm.config.budget import in_epochs
from megarewarm.config.experiment import Experiment, PrepareConfig
from megarewarm.config.experiment_record import check_record, write_record
from megarewarm.console import make_bar
from megarewarm.data.text.continuations import Continuations
from megarewarm.data.text.corpora import prepare_corpora
from megarewarm.errors import UserError, nearest
from megarewarm.file_lock import FileLock
from megarewarm.lab.start_checks import check_runs
from megarewarm.parallel.collective import collective
from megarewarm.parallel.ranks import Ranks
from megarewarm.record.layout import METRICS_FILE
from megarewarm.record.run import read_runs
from megarewarm.report.pages.experiment_page import report_experiment
from megarewarm.report.pages.run_page import report
from megarewarm.report.pages.terminal_table import summary_table
from megarewarm.spelling import counted
from megarewarm.training.start.epochs import settle_epochs
from megarewarm.training.start.inputs import check_place
from megarewarm.training.trainer import train


def chosen_arms(experiment: Experiment, only: Sequence[str]) -> list[Arm]:
    """The runs named in ``only``: by name, by arm (all its seeds), by sweep or chain; all where it is empty.

    Raises ``UserError``.
    """
    called = {arm.name: {arm.name, arm.arm, arm.group, arm.chain} for arm in experiment.arms}
    known = [str(name) for names in called.values() for name in names if name is not None]
    for name in only:
        if name not in known:
            raise UserError(f"--only {name}: no run of experiment '{experiment.config.experiment}'{nearest(name, known)}")
    return [arm for arm in experiment.arms if not only or called[arm.name] & set(only)]


def settled(experiment: Experiment) -> Experiment:
    """``experiment`` with run lengths in epochs converted to steps. Raises ``UserError``."""
    arms = []
    for arm in experiment.arms:
        keys = list(in_epochs(arm.config))
        if keys and experiment.config.prepare is not None:
            raise UserError(
                f"run '{arm.name}': {keys[0]}: epochs are converted to steps before 'prepare' makes the data; give steps "
                f"or tokens"
            )
        try:
            arms.append(replace(arm, config=settle_epochs(arm.config)[0]))
        except UserError as error:
            raise UserError(f"run '{arm.name}': {error}") from error
    return replace(experiment, arms=arms)


def check_folders(experiment: Experiment) -> None:
    """Raise ``UserError`` if a folder that the experiment would train in holds something else. Writes nothing."""
    check_record(experiment)
    for arm in experiment.arms:
        check_place(arm.config, experiment=experiment.folder)


@collective
def run_experiment(experiment: Experiment, ranks: Ranks, console: Console, only: Sequence[str] = ()) -> int:
    """Train the runs in order, or only those named in ``only``. Returns the exit code of the first run that was stopped, 0 if
    all are complete.

    All ranks call it. Raises ``UserError``.
    """
    experiment = settled(experiment)
    arms = chosen_arms(experiment, only)
    check_folders(experiment)
    if ranks.is_main:
        write_record(experiment)
        prepare(experiment, console)
    ranks.barrier()
    check_runs([arm.config for arm in experiment.arms], {arm.name for arm in arms}, ranks.world_size, lambda _: ranks.device)
    folders = []
    for number, arm in enumerate(arms, start=1):
        console.rule(f"{number} of {len(arms)}: {arm.name}", align="left", style="dim")
        outcome = train(arm.config, ranks, console)
        gc.collect()  # a run's model is in cycles of few objects: the collector would not come before several are there
        if outcome.exit_code:
            return outcome.exit_code
        folders.append(outcome.folder)
    if ranks.is_main and not only:
        page = write_report(experiment)
        console.rule("summary", align="left", style="dim")
        console.print(summary_table(read_runs(folders)))
        console.print(f"report: {page}", highlight=False, soft_wrap=True)
    ranks.barrier()
    return 0


def write_report(experiment: Experiment) -> Path:
    """Write the report of what has trained so far, by arm if there are seeds or sweeps, else by run. Returns its page."""
    folder = Path(experiment.folder)
    if experiment.config.seeds or experiment.config.sweeps:
        return report_experiment(folder, folder / "report")
    runs = [Path(arm.config.run_folder) for arm in experiment.arms]
    return report([run for run in runs if (run / METRICS_FILE).exists()], folder / "report")


def prepare(experiment: Experiment, console: Console) -> None:
    """Write the experiment's token files; a lock admits one process at a time. Raises ``UserError``."""
    if experiment.config.prepare is None:
        return
    folder = Path(experiment.config.data_folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", wait=True):
            _prepare(experiment.config.prepare, folder, console)
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error}); set prepare.folder to another place") from error


def _prepare(config: PrepareConfig, folder: Path, console: Console) -> None:
    with make_bar(console) as progress:
        tasks: dict[str, TaskID] = {}

        def show(description: str, done: float, total: float) -> None:
            if description not in tasks:
                tasks[description] = progress.add_task(description, total=total)
            progress.update(tasks[description], completed=done, total=total)

        prepared = prepare_corpora(
            folder,
            {name: (corpus.from_, corpus.limit_mb) for name, corpus in config.corpora.items()},
            vocab_size=config.tokenizer.vocab_size,
            train_on=config.tokenizer.train_on,
            sample_mb=config.tokenizer.sample_mb,
            validation_fraction=config.validation_fraction,
            tasks={
                name: (task.from_, Continuations(**task.model_dump(exclude={"from_"}))) for name, task in config.tasks.items()
            },
            progress=show,
        )
    for note in prepared.notes:
        console.print(note, highlight=False)
    for name, counts in prepared.outputs.items():
        console.print(f"{name}: {counted(counts.documents, 'document')}, {counted(counts.tokens, 'token')}", highlight=False)
