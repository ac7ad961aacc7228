"""Reads an experiment's folder: ``experiment.json``, which records how its runs are related, and the runs that have started."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from megarewarm.errors import UserError
from megarewarm.record.experiment import read_record
from megarewarm.record.layout import AVERAGE, CHECKPOINTS, EXPERIMENT_FILE, EXPORT, METRICS_FILE
from megarewarm.record.lines import Evaluation
from megarewarm.record.run import DOWNSTREAM, NATS, UPSTREAM, NothingYet, RecordedRun, in_one_unit, read_run
from megarewarm.report.numbers.runs import Kind

State = Literal["complete", "under way", "diverged", "not begun"]


@dataclasses.dataclass(frozen=True)
class TrialRecord:
    """One run of an arm, with one seed (``None`` if the experiment has none). ``run`` is ``None`` before it has started.

    ``state`` is 'complete' when all planned ``steps`` were trained; 'diverged' when it ended itself for
    bad steps; another run that stopped counts as 'under way'.
    """

    name: str
    seed: int | None
    steps: int
    tokens: float
    state: State
    run: RecordedRun | None

    @property
    def share(self) -> float:
        """Trained share of the planned steps, 0 to 1."""
        return 1.0 if self.state == "complete" else min(1.0, self.run.steps / self.steps) if self.run and self.steps else 0.0


@dataclasses.dataclass(frozen=True)
class ArmRecord:
    """The runs that differ only in their seed. ``after``: the arms that they start from; ``continued`` whether others start
    from this one; ``groups``: the sweeps whose figures show it, with its values on their axes."""

    name: str
    group: str | None
    groups: dict[str, dict[str, Any]]
    chain: str | None
    stage: int | None
    after: tuple[str, ...]
    continued: bool
    trials: list[TrialRecord]

    @property
    def complete(self) -> list[TrialRecord]:
        """The complete runs: only their numbers count."""
        return [trial for trial in self.trials if trial.state == "complete"]

    @property
    def shown(self) -> list[TrialRecord]:
        """The runs to draw: the complete ones or, if there are none yet, those that have started."""
        return self.complete or [trial for trial in self.trials if trial.run is not None]

    @property
    def runs(self) -> list[RecordedRun]:
        """The runs of ``shown``."""
        return [trial.run for trial in self.shown if trial.run is not None]

    @property
    def unit(self) -> str:
        """Of its validation losses."""
        return self.runs[0].unit if self.runs else NATS

    @property
    def kind(self) -> Kind:
        """'pretraining' if others start from this run from scratch, 'scratch' if none does, else 'continued'."""
        if self.after or any(run.origin for run in self.runs):
            return "continued"
        return "pretraining" if self.continued else "scratch"

    @property
    def sets(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of its upstream and of its downstream validation sets: losses are comparable only if these are the same."""
        first = self.runs[0] if self.runs else None
        return (tuple(first.sets(UPSTREAM)), tuple(first.sets(DOWNSTREAM))) if first else ((), ())

    @property
    def start(self) -> str:
        """What it started from, the same for every seed: 'upstream', 'upstream at step 100', 'upstream/huggingface',
        'grown/runs/mine/seed_*/wide'; empty from scratch."""
        origin, seed = next(((t.run.origin, t.seed) for t in self.shown if t.run is not None and t.run.origin), (None, None))
        if origin is None:
            return self.after[0] if self.after else ""
        path = PurePosixPath(origin)
        if path.parent.name == CHECKPOINTS:
            return f"{path.parent.parent.name} at {path.name.replace('_', ' ')}"
        if path.name in (EXPORT, AVERAGE) and self.after:
            return f"{path.parent.name}/{path.name}"
        return path.name if self.after else origin.replace(f"seed_{seed}/", "seed_*/")


@dataclasses.dataclass(frozen=True)
class ExperimentRecord:
    """An experiment as recorded in its folder."""

    folder: Path
    name: str
    title: str
    arms: list[ArmRecord]

    @property
    def trials(self) -> list[TrialRecord]:
        return [trial for arm in self.arms for trial in arm.trials]

    @property
    def seeds(self) -> list[int]:
        """The seeds, in order; empty if the experiment has none."""
        return list(dict.fromkeys(trial.seed for trial in self.trials if trial.seed is not None))

    @property
    def groups(self) -> list[str]:
        """The sweeps, in order."""
        return list(dict.fromkeys(arm.group for arm in self.arms if arm.group))

    @property
    def unit(self) -> str:
        """Of all validation losses."""
        return next((arm.unit for arm in self.arms if arm.runs), NATS)

    def arm(self, name: str) -> ArmRecord | None:
        return next((arm for arm in self.arms if arm.name == name), None)

    @property
    def main(self) -> ArmRecord | None:
        """The reference arm: the one in most sweeps' figures, the first among equals.

        Single runs come before those of sweeps, and only runs that continue a checkpoint and are not a stage of a chain count.
        """
        able = [arm for arm in self.arms if arm.kind == "continued" and arm.chain is None and not arm.continued]
        return max(able, key=lambda arm: (len(arm.groups), arm.group is None), default=None)


def is_experiment(folder: Path) -> bool:
    """Whether ``folder`` is an experiment's."""
    return (folder / EXPERIMENT_FILE).is_file()


def read_experiment(folder: Path | str) -> ExperimentRecord:
    """The experiment in ``folder``. Raises UserError for a damaged experiment.json and for runs with damaged metrics."""
    folder = Path(folder)
    path = folder / EXPERIMENT_FILE
    if not path.is_file():
        raise UserError(f"{folder.absolute()}: no {path.name}: give the folder of a started experiment, or folders of runs")
    try:
        record = read_record(folder)
        entries = [_entry(folder, entry) for entry in record["runs"]]
        name, title = str(record["experiment"]), str(record.get("title") or record["experiment"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged ({type(error).__name__}: {error}): start the experiment again to rewrite it"
        ) from None
    if not entries:
        raise UserError(f"{path}: lists no runs: start the experiment again to rewrite it")
    return ExperimentRecord(folder, name, title, _arms(_in_one_unit(entries)))


def _entry(folder: Path, entry: dict[str, Any]) -> tuple[dict[str, Any], TrialRecord]:
    steps, tokens_per_step = int(entry["steps"]), int(entry["tokens_per_step"])
    for key in ("arm", "groups", "after"):
        if key not in entry:
            raise KeyError(key)
    run = _begun(folder / entry["folder"])
    stop: dict[str, Any] = next((event for event in reversed(run.events) if event["event"] == "stop"), {}) if run else {}
    state: State = "not begun" if run is None else "under way"
    trained = run is not None and run.steps >= steps and stop.get("evaluated", True)
    if run is not None and (trained or stop.get("reason") == "complete"):
        state = "complete"
    elif run is not None and stop.get("reason") == "diverged" and run.events[-1] is stop:
        state = "diverged"
    return entry, TrialRecord(str(entry["name"]), entry["seed"], steps, float(steps * tokens_per_step), state, run)


def _in_one_unit(entries: Sequence[tuple[dict[str, Any], TrialRecord]]) -> list[tuple[dict[str, Any], TrialRecord]]:
    runs = iter(in_one_unit([trial.run for _, trial in entries if trial.run is not None]))
    return [(entry, trial if trial.run is None else dataclasses.replace(trial, run=next(runs))) for entry, trial in entries]


def _begun(folder: Path) -> RecordedRun | None:
    """The run in ``folder``; ``None`` if it has neither trained nor evaluated yet."""
    path = folder / METRICS_FILE
    if not path.is_file():
        return None
    try:
        return read_run(folder)
    except NothingYet:
        return None


def _arms(entries: Sequence[tuple[dict[str, Any], TrialRecord]]) -> list[ArmRecord]:
    arm_of = {trial.name: str(entry["arm"]) for entry, trial in entries}
    starts = {name: arm_of.get(name, name) for entry, _ in entries for name in _starts(entry)}
    found: dict[str, ArmRecord] = {}
    for entry, trial in entries:
        name = str(entry["arm"])
        if name not in found:
            found[name] = ArmRecord(
                name=name,
                group=entry.get("group"),
                groups=dict(entry["groups"]),
                chain=entry.get("chain"),
                stage=entry.get("stage"),
                after=tuple(dict.fromkeys(starts[start] for start in _starts(entry))),
                continued=name in starts.values(),
                trials=[],
            )
        found[name].trials.append(trial)
    return list(found.values())


def _starts(entry: dict[str, Any]) -> list[str]:
    """The runs that one starts from, of those that it waits for."""
    return [name for name in entry["after"] if name not in entry.get("taught_by", ())]


def mean_run(runs: Sequence[RecordedRun], name: str) -> RecordedRun:
    """The mean of runs that differ only in their seed: every number that all of them have, averaged step by step.

    It has the first run's config and no events. The mean of one run is that run under the new name.
    """
    first = runs[0]
    start = first.start | {"name": name}
    steps = first.train["step"]
    for run in runs[1:]:
        steps = np.intersect1d(steps, run.train["step"])
    columns = [{key: run.train[key][np.isin(run.train["step"], steps)] for key in run.train} for run in runs]
    train = {key: np.mean([column[key] for column in columns], axis=0) for key in first.train}
    found = [{(e.step, e.name): e for e in run.evaluations} for run in runs]
    common = [key for key in found[0] if all(key in other for other in found)]
    evaluations = [
        Evaluation(
            step=e.step,
            tokens=float(np.mean([other[key].tokens for other in found])),
            name=e.name,
            role=e.role,
            loss=float(np.mean([other[key].loss for other in found])),
        )
        for key in common
        for e in (found[0][key],)
    ]
    return RecordedRun(first.folder, first.config, start, train, evaluations, [], first.unit)


def joined_run(runs: Sequence[RecordedRun], name: str) -> RecordedRun:
    """Consecutive runs (the stages of a chain) as one run with continuous steps and tokens.

    The checkpoint between two runs was evaluated twice; the later evaluation counts.
    """
    trains: list[dict[str, Any]] = []
    evaluations: dict[tuple[int, str], Evaluation] = {}
    steps, tokens = 0, 0.0
    for run in runs:
        by_step, by_token = steps - run.first_step, tokens - run.tokens_before
        moved = dict(run.train)
        moved["step"], moved["tokens"] = run.train["step"] + by_step, run.train["tokens"] + by_token
        trains.append(moved)
        for e in run.evaluations:
            evaluations[e.step + by_step, e.name] = dataclasses.replace(e, step=e.step + by_step, tokens=e.tokens + by_token)
        steps, tokens = steps + run.steps, tokens + run.tokens
    first = runs[0]
    train = {key: np.concatenate([moved[key] for moved in trains]) for key in first.train}
    return RecordedRun(
        first.folder, first.config, first.start | {"name": name}, train, list(evaluations.values()), [], first.unit
    )
