"""The finished runs of an experiment, put together into families whose runs differ in one thing only."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megarewarm.errors import UserError
from megarewarm.report.read import DOWNSTREAM, UPSTREAM, Run, read_run
from megarewarm.report.record import read_record

Floats = NDArray[np.float64]

_ASIDE = ("name", "folder", "logging", "checkpoint", "evaluation", "export", "parallel", "kernels", "interpolate")
"""Sections that don't change what is learned."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """One finished run. ``rates`` (steps,) is the learning rate of every step; ``losses`` maps a role to (steps, losses) of its
    evaluations, both (points,), steps counted from the run's start, the first the start checkpoint's.

    ``arm`` is the same for all seeds. ``rate_before`` and ``sum_before`` are the last learning rate and the sum of rates of
    what it started from, ``None`` where that isn't known.
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

    @property
    def steps(self) -> int:
        return len(self.rates)

    @property
    def replay(self) -> float:
        """Share of the old data in what it was trained on."""
        replay = self.config.get("replay") or {}
        return float(replay.get("fraction") or 0.0)

    def start(self, role: str) -> float:
        return float(self.losses[role][1][0])

    def final(self, role: str) -> float:
        return float(self.losses[role][1][-1])


@dataclasses.dataclass(frozen=True)
class Family:
    """Runs that differ in one thing only, apart from seeds. ``label`` names it after its first run."""

    runs: list[Trained]

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

    def without(self, arm: str) -> list[Trained]:
        return [run for run in self.runs if run.arm != arm]

    def mean_start(self, role: str) -> float:
        """Start loss, mean over seeds."""
        return float(np.mean([run.start(role) for run in self.runs]))

    def mean_final(self, arm: str, role: str) -> float:
        return float(np.mean([run.final(role) for run in self.of(arm)]))


def read_trained(folder: Path) -> tuple[str, list[Trained], list[str]]:
    """Title, finished runs that continue a checkpoint, and a note on each kind of run that is left out.

    Raises ``UserError`` where the folder is no experiment's, or nothing in it is finished.
    """
    path = folder / "experiment.json"
    if not path.is_file():
        raise UserError(f"{folder}: no experiment.json: give the folder of an experiment (runs/NAME) that has been started")
    try:
        told = read_record(folder)
        entries = [(str(r["name"]), str(r["arm"]), r.get("seed"), folder / r["folder"]) for r in told["runs"]]
        title = str(told.get("title") or told["experiment"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: can't be understood ({type(error).__name__}: {error}): start the experiment again, which writes it anew"
        ) from None
    runs: dict[str, Run] = {}
    unfinished = 0
    for name, _, _, place in entries:
        if not (place / "metrics.jsonl").is_file():
            unfinished += 1
            continue
        try:
            run = read_run(place)
        except UserError as error:
            if "before its first step" not in str(error):
                raise
            unfinished += 1
            continue
        if not any(event["event"] == "stop" and event.get("reason") == "complete" for event in run.events[-1:]):
            unfinished += 1
            continue
        runs[name] = run
    by_place = {place.resolve(): runs[name] for name, _, _, place in entries if name in runs}
    trained, scratch, blind = [], 0, 0
    for name, arm, seed, _ in entries:
        if name not in runs:
            continue
        if runs[name].origin is None:
            scratch += 1
        elif (one := _trained(name, arm, seed, runs[name], by_place)) is None:
            blind += 1
        else:
            trained.append(one)
    notes = []
    if unfinished:
        notes.append(f"{unfinished} of {len(entries)} runs are not finished and left out")
    if scratch:
        notes.append(f"{scratch} trained from scratch: the laws here are of runs that start from a checkpoint")
    if blind:
        notes.append(
            f"{blind} lack an evaluation of the start checkpoint (evaluation.at_start) or have a loss that is not finite"
        )
    if not trained:
        raise UserError(f"{folder}: no finished run that started from a checkpoint: {'; '.join(notes) or 'it has no runs'}")
    return title, trained, notes


def _trained(name: str, arm: str, seed: int | None, run: Run, by_place: dict[Path, Run]) -> Trained | None:
    losses = {}
    for role in (UPSTREAM, DOWNSTREAM):
        curve = run.curve(role)
        steps = np.array(sorted({e.step for e in run.evaluations if e.role == role}), dtype=np.float64)
        if len(curve) < 2 or len(steps) != len(curve):
            continue
        if run.start_loss(role) is None or not np.all(np.isfinite(curve.losses)):
            return None
        losses[role] = (steps - run.first_step, curve.losses)
    rates = run.train["lr"]
    if not losses or not np.all(np.isfinite(rates)) or run.steps != len(rates):
        return None
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
    )


def _before(run: Run, by_place: dict[Path, Run]) -> tuple[float | None, float | None]:
    """Last rate and sum of rates of the runs before this one, as far back as they lie in the same experiment."""
    if run.origin is None:
        return None, 0.0
    origin, step = Path(run.origin), math.inf
    if origin.name.startswith("step_") and origin.parent.name == "checkpoints":
        step, origin = float(origin.name.removeprefix("step_")), origin.parent.parent
    found = next((other for place, other in by_place.items() if _ends_alike(place, origin)), None)
    if found is None:
        return None, None
    used = found.train["lr"][found.train["step"] <= step]
    if len(used) == 0 or not np.all(np.isfinite(used)):
        return None, None
    _, earlier = _before(found, by_place)
    return float(used[-1]), None if earlier is None else float(used.sum()) + earlier


def _ends_alike(place: Path, told: Path) -> bool:
    """Whether two paths are one run's, wherever its experiment's folder has been moved: experiment, seed and name agree."""
    return place.parts[-min(3, len(told.parts)) :] == told.parts[-3:]


def schedule_families(runs: Sequence[Trained]) -> list[Family]:
    """Families whose runs differ in the learning-rate schedule only, the largest first."""
    return _families(runs, lambda config: config.pop("schedule", None), lambda run: tuple(np.round(run.rates, 12)))


def replay_families(runs: Sequence[Trained]) -> list[Family]:
    """Families whose runs differ in the fraction of replay only, the largest first."""

    def drop(config: dict[str, Any]) -> None:
        config.pop("replay", None)

    return _families(runs, drop, lambda run: run.replay)


def _families(
    runs: Sequence[Trained], drop: Callable[[dict[str, Any]], object], distinct: Callable[[Trained], Any]
) -> list[Family]:
    groups: dict[str, list[Trained]] = {}
    for run in runs:
        config = json.loads(json.dumps(run.config, default=str))
        for section in _ASIDE:
            config.pop(section, None)
        drop(config)
        for section in ("training", "data"):
            if isinstance(config.get(section), dict):
                config[section].pop("seed", None)
        text = json.dumps(config, sort_keys=True)
        if run.seed is not None:  # what is made anew for every seed is the same thing
            text = text.replace(f"seed_{run.seed}/", "seed_/")
        groups.setdefault(text, []).append(run)
    families = [Family(group) for group in groups.values()]
    counted = [(len({distinct(run) for run in family.runs}), family) for family in families]
    return [family for _, family in sorted((pair for pair in counted if pair[0] > 1), key=lambda pair: -pair[0])]
