"""Run an experiment: prepare its data, train its runs one after another, report. Whatever is done already is kept."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from megarewarm.config.experiment import ExperimentConfig, PrepareConfig
from megarewarm.config.schema import RunConfig
from megarewarm.data.corpora import prepare_corpora
from megarewarm.parallel.ranks import Ranks
from megarewarm.report.page import report
from megarewarm.report.read import read_run
from megarewarm.report.table import summary_table
from megarewarm.training.trainer import train


def run_experiment(experiment: ExperimentConfig, runs: list[RunConfig], ranks: Ranks, console: Console) -> int | None:
    """All runs in order. Returns the signal that stopped it, or None when it is complete. All ranks call it."""
    folder = Path(experiment.experiment_folder)
    if experiment.prepare is not None:
        if ranks.is_main:
            _prepare(experiment.prepare, Path(experiment.data_folder), console)
        ranks.barrier()
    folders = []
    for number, run in enumerate(runs, start=1):
        console.rule(f"{number} of {len(runs)}: {run.name}", align="left", style="dim")
        outcome = train(run, ranks, console)
        if outcome.stopped_by is not None:
            return outcome.stopped_by
        folders.append(outcome.folder)
    if ranks.is_main:
        page = report(folders, folder / "report")
        console.rule("summary", align="left", style="dim")
        console.print(summary_table([read_run(run_folder) for run_folder in folders]))
        console.print(f"report: {page}", highlight=False, soft_wrap=True)
    ranks.barrier()
    return None


def _prepare(config: PrepareConfig, folder: Path, console: Console) -> None:
    with Progress(
        TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), TimeRemainingColumn(), console=console
    ) as progress:
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
            progress=show,
        )
    for note in prepared.notes:
        console.print(note, highlight=False)
    for name, counts in prepared.outputs.items():
        console.print(f"{name}: {counts.documents:,} documents, {counts.tokens:,} tokens", highlight=False)
