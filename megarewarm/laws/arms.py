"""The finished runs of an experiment, grouped into families whose runs differ in one setting."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megarewarm.errors import UserError
from megarewarm.record.events import TaskEvent
from megarewarm.record.experiment import read_record
from megarewarm.record.layout import CHECKPOINTS, EXPERIMENT_FILE, METRICS_FILE, step_of
from megarewarm.record.run import DOWNSTREAM, UPSTREAM, NothingYet, RecordedRun, in_one_unit, read_run
from megarewarm.report.numbers.runs import unit_sentences
from megarewarm.report.numbers.tasks import TaskKey, apart_sentences, tests_of

Floats = NDArray[np.float64]

_APART = 0.005  # nats: start losses of one seed that differ by more belong to different checkpoints, whatever their names

_ASIDE = ("name", "folder", "logging", "checkpoint", "evaluation", "export", "parallel", "kernels", "interpolate")
"""Sections that don't affect what is learned."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """One finished run. ``rates`` (steps,) is the learning rate of every step; ``losses`` maps a role to (steps, losses) of its
    evaluations, both (points,), with steps counted from the run's start; the first is the start checkpoint's.

    ``arm`` is the same for all seeds. ``rate_before`` and ``sum_before`` are the last learning rate and the sum of rates of its
    start checkpoint, ``None`` if unknown. A run that is not ``finite`` diverged: its losses are ignored, and it may have ended
    before the ``planned`` steps, if those are known. ``tests``: on each task, in order.
    """

    name: str
    arm: str
    seed: int | None
    config: dict[str, Any]
    schedule: dict[str, Any]
    rates: Floats
    tokens_per_step: float
    losses: dict[str, tuple[Floats, Floats]]
    rate_before: float | None = None
    sum_before: float | None = None
    finite: bool = True
    planned: int | None = None
    tests: dict[TaskKey, list[TaskEvent]] = dataclasses.field(default_factory=dict)

    @property
    def steps(self) -> int:
        """The planned steps; for a finished run these are the trained ones."""
        return len(self.rates) if self.finite or self.planned is None else self.planned

    @property
    def replay(self) -> float:
        """Share of old data in the training data."""
        replay = self.config.get("replay")
        fraction = replay.get("fraction") if isinstance(replay, dict) else None
        return float(fraction) if isinstance(fraction, int | float) else 0.0

    @property
    def tokens(self) -> float:
        return self.steps * self.tokens_per_step

    def start(self, role: str) -> float:
        return float(self.losses[role][1][0])

    def final(self, role: str) -> float:
        return float(self.losses[role][1][-1])


@dataclasses.dataclass(frozen=True)
class Family:
    """Runs that differ in one setting, apart from seeds. ``label`` is the name of the first arm. ``diverged`` are the runs of
    arms with a diverged seed; they are not in ``runs``."""

    runs: list[Trained]
    diverged: list[Trained] = dataclasses.field(default_factory=list)

    @property
    def label(self) -> str:
        return self.arms[0]

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(run.arm for run in self.runs))

    @property
    def roles(self) -> list[str]:
        return [role for role in (UPSTREAM, DOWNSTREAM) if all(role in run.losses for run in self.runs)]

    def of(self, arm: str) -> list[Trained]:
        return [run for run in self.runs if run.arm == arm]

    def mean_start(self, role: str) -> float:
        """Start loss, mean over seeds."""
        return float(np.mean(list({run.seed: run.start(role) for run in self.runs}.values())))

    def mean_final(self, arm: str, role: str) -> float:
        """Final loss as the mean over the arm's seeds of each seed's change from its own start: arms may lack seeds."""
        return self.mean_start(role) + float(np.mean([run.final(role) - run.start(role) for run in self.of(arm)]))


def read_trained(folder: Path) -> tuple[str, list[Trained], list[str]]:
    """Title, finished runs that continue a checkpoint, and a note on each kind of run that is left out.

    Raises ``UserError`` if the folder is not an experiment's, or holds no finished run.
    """
    path = folder / EXPERIMENT_FILE
    if not path.is_file():
        raise UserError(f"{folder.absolute()}: no {EXPERIMENT_FILE}: give the folder of an experiment that has been started")
    try:
        told = read_record(folder)
        entries = [(str(r["name"]), str(r["arm"]), r.get("seed"), folder / r["folder"]) for r in told["runs"]]
        title = str(told.get("title") or told["experiment"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged ({type(error).__name__}: {error}): start the experiment again to rewrite it"
        ) from None
    runs = {name: run for name, _, _, place in entries if (run := _finished(place)) is not None}
    runs = dict(zip(runs, in_one_unit(list(runs.values())), strict=True))
    by_place = {place.resolve(): runs[name] for name, _, _, place in entries if name in runs}
    trained = []
    left_out: dict[str, list[str]] = {}
    for name, arm, seed, _ in entries:
        one = _trained(name, arm, seed, runs[name], by_place) if name in runs else _UNFINISHED
        if isinstance(one, Trained):
            trained.append(one)
        else:
            left_out.setdefault(one, []).append(name)
    notes = [f"{len(names)} of {len(entries)} runs left out, {why}: {_shown(names)}" for why, names in left_out.items()]
    notes += [*unit_sentences(next(iter(runs.values())).unit), *apart_sentences(list(runs.values()))] if runs else []
    for role in (UPSTREAM, DOWNSTREAM):
        if blind := [run.name for run in trained if role not in run.losses and runs[run.name].sets(role)]:
            notes.append(f"The {role} loss of {_shown(blind)} is not used: {_NO_START}")
    if lost := [run.name for run in trained if not run.finite]:
        notes.append(
            f"{len(lost)} diverged or have a loss that is not finite: {_shown(lost)}; neither their arms "
            f"nor points next to them are recommended"
        )
    if not any(run.finite for run in trained):
        why = "; ".join(notes) or "the experiment has no runs"
        raise UserError(f"{folder}: no finished run that started from a checkpoint and ended with finite losses: {why}")
    return title, trained, notes


_UNFINISHED = "not finished"
_FROM_SCRATCH = "trained from scratch, but the laws need a start checkpoint"
_NO_START = "no evaluation of the start checkpoint on all validation sets (evaluation.at_start), or no later one"
_BAD_START = "the start loss is not finite"
_BAD_RATES = "steps or learning rates are missing in metrics.jsonl"


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _finished(place: Path) -> RecordedRun | None:
    """The run in the folder ``place`` if it has ended, completed or diverged."""
    try:
        run = read_run(place) if (place / METRICS_FILE).is_file() else None
    except NothingYet:
        return None
    ends = run.events[-1:] if run else []
    return run if any(end["event"] == "stop" and end.get("reason") in ("complete", "diverged") for end in ends) else None


def _trained(name: str, arm: str, seed: int | None, run: RecordedRun, by_place: dict[Path, RecordedRun]) -> Trained | str:
    """The run in the form the laws use, or why it can't be used."""
    if run.origin is None:
        return _FROM_SCRATCH
    losses = {}
    finite = run.events[-1].get("reason") == "complete"
    for role in (UPSTREAM, DOWNSTREAM):
        curve, start = run.curve(role), run.start_loss(role)
        if len(curve) < 2 or start is None:
            continue
        if not math.isfinite(start):
            return _BAD_START
        finite = finite and bool(np.all(np.isfinite(curve.losses)))
        counts = Counter(e.step for e in run.evaluations if e.role == role)
        steps = sorted(step for step, count in counts.items() if count == len(run.sets(role)))  # the curve's
        losses[role] = (np.array(steps, dtype=np.float64) - run.first_step, curve.losses)
    if not losses:
        return _NO_START
    rates = run.train["lr"]
    if not np.all(np.isfinite(rates)) or run.steps != len(rates):
        return _BAD_RATES
    rate_before, sum_before = _before(run, by_place)
    spec = run.start.get("schedule")
    return Trained(
        name=name,
        arm=arm,
        seed=seed if isinstance(seed, int) else None,
        config=run.config,
        schedule=spec if isinstance(spec, dict) else {},
        rates=rates,
        tokens_per_step=run.tokens / max(run.steps, 1),
        losses=losses,
        rate_before=rate_before,
        sum_before=sum_before,
        finite=finite,
        planned=total - run.first_step if isinstance(total := run.start.get("total_steps"), int) else None,
        tests=tests_of(run),
    )


def _before(run: RecordedRun, by_place: dict[Path, RecordedRun]) -> tuple[float | None, float | None]:
    """Last rate and sum of rates of the runs before this one, as far back as the same experiment holds them."""
    if run.origin is None:
        return None, 0.0
    origin, step = Path(run.origin), math.inf
    if origin.parent.name == CHECKPOINTS and (number := step_of(origin.name)) is not None:
        step, origin = float(number), origin.parent.parent
    found = next((other for place, other in by_place.items() if _ends_alike(place, origin)), None)
    if found is None:
        return None, None
    used = found.train["lr"][found.train["step"] <= step]
    if len(used) == 0 or not np.all(np.isfinite(used)):
        return None, None
    _, earlier = _before(found, by_place)
    return float(used[-1]), None if earlier is None else float(used.sum()) + earlier


def _ends_alike(place: Path, told: Path) -> bool:
    """Whether two paths belong to one run, even if the experiment's folder was moved: experiment, seed and name agree."""
    return place.parts[-min(3, len(told.parts)) :] == told.parts[-3:]


def distinct_rates(runs: Sequence[Trained]) -> list[Floats]:
    """The distinct learning-rate curves (steps,) of the runs; differences by rounding are ignored."""
    found: list[Floats] = []
    for run in runs:
        if not any(len(run.rates) == len(rates) and np.allclose(run.rates, rates, rtol=1e-4, atol=0) for rates in found):
            found.append(run.rates)
    return found


def schedule_families(runs: Sequence[Trained]) -> list[Family]:
    """Families whose runs differ only in the learning-rate schedule, the largest first."""
    return _families(runs, "schedule", lambda family: len(distinct_rates(family.runs)))


def replay_families(runs: Sequence[Trained]) -> list[Family]:
    """Families whose runs differ only in the replay fraction, the largest first. Runs without replay are in all of them."""
    return _families(runs, "replay", lambda family: len({round(run.replay, 4) for run in family.runs}))


def questions(runs: Sequence[Trained]) -> list[Family]:
    """Sets of runs with comparable losses: same start, same validation sets, same number of tokens; the largest first."""

    def key(run: Trained) -> Any:
        config = _plain(run)
        data = config.get("data")
        sets = data.get("validation") if isinstance(data, dict) else None
        return [config.get("start"), sets, config.get("windows"), round(run.tokens), sorted(run.losses)]

    found = [_without_diverged(group) for group in _grouped(runs, key)]
    return sorted((family for family in found if family.runs), key=lambda family: -len(family.arms))


def _families(runs: Sequence[Trained], varied: str, levels: Callable[[Family], int]) -> list[Family]:
    def key(run: Trained) -> Any:
        config = _plain(run)
        value = config.pop(varied, None)
        if varied == "replay" and isinstance(value, dict):  # the source of the old data is not what varies
            return [config, {k: v for k, v in value.items() if k != "fraction"}]
        return [config, None]

    groups = _grouped(runs, key)
    if varied == "replay":
        bare = {_text(key(run)[0]): group for group in groups for run in group[:1] if key(run)[1] is None}
        with_replay = [group for group in groups if key(group[0])[1] is not None]
        groups = [[*bare.get(_text(key(group[0])[0]), []), *group] for group in with_replay]
        groups = [part for group in groups for part in _same_start(group)]
    families = [(levels(family), family) for group in groups if (family := _without_diverged(group)).runs]
    return [family for _, family in sorted((pair for pair in families if pair[0] > 1), key=lambda pair: -pair[0])]


def _without_diverged(group: Sequence[Trained]) -> Family:
    """The group as a family. An arm with a diverged seed is not judged by its other seeds."""
    lost = {run.arm for run in group if not run.finite}
    return Family([run for run in group if run.arm not in lost], [run for run in group if run.arm in lost])


def _plain(run: Trained) -> dict[str, Any]:
    """The configuration without the seed, and without sections that affect neither what is learned nor how it is measured."""
    config: dict[str, Any] = json.loads(json.dumps(run.config, default=str))
    evaluation = config.get("evaluation")
    windows = evaluation.get("windows") if isinstance(evaluation, dict) else None
    for section in _ASIDE:
        config.pop(section, None)
    for section in ("training", "data"):
        if isinstance(config.get(section), dict):
            config[section].pop("seed", None)
    replay = config.get("replay")
    if isinstance(replay, dict) and not replay.get("fraction"):
        config["replay"] = None
    return config | {"windows": windows}


def _grouped(runs: Sequence[Trained], key: Callable[[Trained], Any]) -> list[list[Trained]]:
    groups: dict[str, list[Trained]] = {}
    for run in runs:
        text = _text(key(run))
        if run.seed is not None:  # paths that differ only in the seed are equal
            text = text.replace(f"seed_{run.seed}/", "seed_/")
        groups.setdefault(text, []).append(run)
    return [part for group in groups.values() for part in _same_start(group)]


def _same_start(group: Sequence[Trained]) -> list[list[Trained]]:
    """The runs split by the losses of their start checkpoints: a path may have held another checkpoint later."""
    parts: dict[tuple[int, ...], list[Trained]] = {}
    for run in group:
        place = []
        for role in sorted(run.losses):
            known = sorted({other.start(role) for other in group if other.seed == run.seed and role in other.losses})
            gaps = [high - low > _APART for low, high in itertools.pairwise(known)]
            place.append(sum(gaps[: known.index(run.start(role))]))
        parts.setdefault(tuple(place), []).append(run)
    return list(parts.values())


def _text(value: Any) -> str:
    """JSON text that is equal for values that differ only by rounding."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rounded(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [rounded(inner) for inner in value]
        return f"{value:.6g}" if isinstance(value, int | float) and not isinstance(value, bool) else value

    return json.dumps(rounded(value), sort_keys=True)
