"""From an experiment to its report: check, show the plan and its cost, prepare the data, run what is not done, report."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live

from megarewarm.config.experiment import Experiment
from megarewarm.config.experiment_record import write_record
from megarewarm.errors import UserError
from megarewarm.lab.experiment import check_folders, chosen_arms, prepare, settled, write_report
from megarewarm.lab.local import Job, Result, cores, devices, run_locally
from megarewarm.lab.outlook import Prospect, prospects, show_outlook
from megarewarm.lab.slurm import submit
from megarewarm.model.size import count_parameters
from megarewarm.record.layout import METRICS_FILE
from megarewarm.report.live.frame import frame
from megarewarm.report.live.watch import Watch
from megarewarm.spelling import counted
from megarewarm.training.start.memory import machine_memory

_PROCESS_BYTES = 700e6  # Python, torch and the data's caches
_PARAMETER_BYTES = 28.0  # weights, gradients, moments, a checkpoint's copy and activations of a small batch
_LOOK_EVERY = 2.0  # seconds
EXIT_FAILED = 1


def sweep(
    experiment: Experiment,
    words: Sequence[str],
    console: Console,
    *,
    launcher: str,
    jobs: int | None,
    ranks: int,
    options: Sequence[str],
    only: Sequence[str],
    dry_run: bool,
    environment: dict[str, str],
    allow_missing: bool = False,
) -> int:
    """Run the unfinished runs of ``experiment``. ``words``: its arguments on a command line; the rest is as for ``megarewarm
    sweep``. Returns the exit code: 0, 1 if runs failed, 128 + n if signal n stopped it. Raises ``UserError``."""
    experiment = settled(experiment)
    arms = chosen_arms(experiment, only)
    check_folders(experiment)
    found = prospects(experiment, arms, ranks if launcher == "local" else None)
    at_once = jobs or (fitting_jobs(found, ranks) if launcher == "local" else len(found))
    show_outlook(experiment, found, at_once, console)
    missing = {line: prospect for prospect in reversed(found) if prospect.state != "done" for line in prospect.missing}
    if missing and not allow_missing:
        raise UserError("\n".join(f"{prospect.arm.name}: {line}" for line, prospect in missing.items()))
    for line, prospect in missing.items():
        console.print(f"missing, needed to train: {prospect.arm.name}: {line}", style="yellow", highlight=False)
    if dry_run:
        return 0
    write_record(experiment)
    left = [prospect.arm for prospect in found if prospect.state != "done"]
    folder = Path(experiment.folder)
    if left:
        prepare(experiment, console)
    if left and launcher == "slurm":
        for wave in submit(left, words, folder, jobs=jobs, options=options, environment=environment):
            console.print(f"job {wave.job}: {len(wave.arms)} runs ({wave.list_file})", highlight=False)
        console.print(
            f"megarewarm watch {folder} shows their progress; the same sweep command later submits what is not done",
            highlight=False,
        )
        return 0
    result = Result()
    if left:
        with _Teller(console, folder, len(left), {arm.name for arm in arms}) as teller:
            result = run_locally(left, words, folder, jobs=at_once, ranks=ranks, tick=teller)
    return _conclude(experiment, result, only, console)


def fitting_jobs(found: Sequence[Prospect], ranks: int) -> int:
    """How many runs at a time fit on the GPUs, or without GPUs into cores and memory; at least 1."""
    gpus = len(devices())
    if gpus:
        return max(1, gpus // ranks)
    memory = machine_memory() * 0.7
    largest = max((_parameters(prospect) for prospect in found), default=0)
    by_memory = int(memory / (ranks * (_PROCESS_BYTES + _PARAMETER_BYTES * largest)))
    return max(1, min(cores() // ranks, by_memory, len(found)))


def _parameters(prospect: Prospect) -> int:
    model = prospect.arm.config.model
    return count_parameters(model) if model is not None else 0


class _Teller:
    """Prints a line for each run that starts or ends, with the count so far; on a terminal, megarewarm watch's view below it.

    ``total``: number of runs to run; ``chosen``: the names of those and of the runs done before.
    """

    def __init__(self, console: Console, folder: Path, total: int, chosen: Collection[str]) -> None:
        self._console, self._total = console, total
        self._begun: set[str] = set()
        self._told: set[str] = set()
        self._watch = Watch(folder, only=chosen)
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._looked = 0.0

    def __enter__(self) -> _Teller:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def _show(self) -> None:
        if self._live is None or time.monotonic() - self._looked < _LOOK_EVERY:
            return
        self._looked = time.monotonic()
        unicode = not self._console.options.ascii_only
        lines = frame(self._watch.look(), self._console.width, self._console.height - 2, unicode=unicode)
        self._live.update(Group(*lines), refresh=True)

    def __call__(self, running: Sequence[Job], result: Result) -> None:
        for job in running:
            if job.arm.name not in self._begun:
                self._begun.add(job.arm.name)
                self._console.print(f"{job.arm.name}: started ({job.log})", highlight=False)
        ended = {name: "complete" for name in result.done} | result.failed
        ended |= {name: "skipped because the run that it starts from failed" for name in result.skipped}
        for name, how in ended.items():
            if name not in self._told:
                self._told.add(name)
                style = None if how == "complete" else "red"
                self._console.print(f"{name}: {how}; {len(self._told)} of {self._total}", style=style, highlight=False)
        self._show()


def _conclude(experiment: Experiment, result: Result, only: Sequence[str], console: Console) -> int:
    if result.stopped_by is not None:
        console.print("stopped; the same command resumes from here", style="yellow")
        return 128 + result.stopped_by
    if any((Path(arm.config.run_folder) / METRICS_FILE).exists() for arm in experiment.arms):
        console.print(f"report: {write_report(experiment)}", highlight=False, soft_wrap=True)
    if result.failed:
        console.print(
            f"{counted(len(result.failed), 'run')} failed, {len(result.skipped)} skipped because of that; the same command "
            f"retries them",
            style="red",
        )
        return EXIT_FAILED
    return 0
