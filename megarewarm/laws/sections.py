"""The laws of one family of runs, and their predictions for new runs: within the tested range, and plausible."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from megarewarm.laws import annealing, replay
from megarewarm.laws.annealing import AnnealingLaw, fit_annealing
from megarewarm.laws.arms import Family, Trained, distinct_rates
from megarewarm.laws.fitting import Trial, pooled
from megarewarm.laws.replay import ReplayLaw, fit_replay
from megarewarm.laws.support import FRACTION, LENGTHS, RATES, Point, Space, natural, schedule_point
from megarewarm.record.run import DOWNSTREAM, UPSTREAM
from megarewarm.schedules.schedule import Schedule
from megarewarm.spelling import counted, rate_text

_ROUND = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)  # replay fractions in common use
_KEYS = {"warmup_steps": "warmup"}  # config keys, where a recorded schedule has another name
_BAND = 1.645  # standard errors on each side of a 90 % interval
_LEARNED = 0.005  # nats: a smaller fall of the upstream loss below its start is noise


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Final losses in nats per token by role, for the roles whose law holds. ``what`` describes the run; ``keys`` are its
    config keys; ``arm`` is the arm that was run at this point, ``None`` for a new run."""

    what: str
    keys: dict[str, Any]
    losses: dict[str, float]
    bands: dict[str, float]
    arm: str | None = None

    @property
    def mean(self) -> float:
        return sum(self.losses.values()) / len(self.losses)


@dataclasses.dataclass(frozen=True)
class LawSection:
    """The laws of one family. ``kind`` is what its runs differ in; ``laws`` is empty if none could be fitted."""

    kind: Literal["schedule", "replay"]
    family: Family
    space: Space
    laws: dict[str, AnnealingLaw | ReplayLaw]
    predictions: list[Prediction] = dataclasses.field(default_factory=list)
    sentences: list[str] = dataclasses.field(default_factory=list)

    @property
    def trials(self) -> dict[str, Trial]:
        return {role: law.trial for role, law in self.laws.items()}


def sections_of(
    schedules: Sequence[Family], replays: Sequence[Family], progress: Callable[[str], None] = lambda _: None
) -> list[LawSection]:
    """Fit and test the families' laws, and predict new runs. ``progress`` is called with a description of the next fit."""
    fitted = [_fitted("schedule", family, progress) for family in schedules]
    fitted += [_fitted("replay", family, progress) for family in replays]
    told = []
    for section in _pooled(fitted):
        predictions, refused = _predictions(section)
        sentences = [*_missing(section.family), *_trust(section), *refused] if section.laws else [_few(section)]
        told.append(dataclasses.replace(section, predictions=predictions, sentences=sentences))
    return told


def _fitted(kind: Literal["schedule", "replay"], family: Family, progress: Callable[[str], None]) -> LawSection:
    found: dict[str, AnnealingLaw | ReplayLaw] = {}
    space = Space.of_schedules(family) if kind == "schedule" else Space.of_replay(family)
    for role in family.roles:
        progress(f"fitting the {kind} law to the {role} loss of {len(family.arms)} arms")
        law = fit_annealing(family, role, space) if kind == "schedule" else fit_replay(family, role, space)
        if law is not None:
            found[role] = law
    return LawSection(kind, family, space, found)


def _pooled(sections: Sequence[LawSection]) -> list[LawSection]:
    """The sections, each law's band at least as wide as that of the same law over all of them."""
    laws = [dict(section.laws) for section in sections]
    for kind, role in itertools.product(("schedule", "replay"), (UPSTREAM, DOWNSTREAM)):
        same = [index for index, section in enumerate(sections) if section.kind == kind and role in section.laws]
        for index, trial in zip(same, pooled([laws[index][role].trial for index in same]), strict=True):
            laws[index][role] = dataclasses.replace(laws[index][role], trial=trial)
    return [dataclasses.replace(section, laws=law) for section, law in zip(sections, laws, strict=True)]


def _predictions(section: LawSection) -> tuple[list[Prediction], list[str]]:
    """Predictions for all points within the tested range, and sentences that count the omitted ones."""
    laws = {role: law for role, law in section.laws.items() if law.trial.holds}
    impossible, vague = 0, 0
    found = []
    further = _ROUND if section.kind == "replay" else ()
    for point in [point for kind in section.space.kinds for point in section.space.candidates(kind, further)] if laws else []:
        arm = section.space.arm_at(point)
        losses, bands = {}, {}
        for role, law in laws.items():
            value, error = _value(section, role, law, point)
            band = max(law.trial.band, _BAND * error)
            if not 2 * band < law.trial.range:
                vague += 1
            elif not possible(section.family, role, value, band):
                impossible += 1
            else:
                losses[role], bands[role] = value, band
        if losses:
            found.append(Prediction(_what(section, point), _keys(section, point), losses, bands, arm))
    sentences = []
    if impossible:
        sentences.append(f"{impossible} predicted losses contradict the measured ones and are omitted.")
    if vague:
        sentences.append(f"{vague} predicted losses are not determined by these runs and are omitted.")
    return found, sentences


def possible(family: Family, role: str, value: float, band: float) -> bool:
    """Whether a final loss agrees with the measured ones: not below 0, outside the arms' range by at most the band, and no
    upstream loss below the start's if no arm got below it."""
    ends = [family.mean_final(arm, role) for arm in family.arms]
    low, high = max(0.0, min(ends) - band), max(ends) + band
    if role == UPSTREAM and min(ends) >= family.mean_start(role) - _LEARNED:
        low = max(low, min(family.mean_start(role), min(ends)))
    return low <= value <= high


def _value(section: LawSection, role: str, law: AnnealingLaw | ReplayLaw, point: Point) -> tuple[float, float]:
    """The predicted final loss and its standard error from the fit."""
    if isinstance(law, ReplayLaw):
        fraction = point.values[FRACTION]
        return float(law.loss(np.array([fraction]))[0]), law.uncertainty(fraction)
    run = section.family.runs[0]
    rates = _schedule(section, point).values(np.arange(run.steps))
    starts = {(run.rate_before, run.sum_before) for run in section.family.runs}
    ends = [float(law.change(rates, *before)[-1]) for before in starts]
    return section.family.mean_start(role) + float(np.mean(ends)), law.uncertainty(rates, *next(iter(starts)))


def _schedule(section: LawSection, point: Point) -> Schedule:
    """The schedule at a point: that of an arm of its kind, with the point's values."""
    arm = next(iter(section.space.of(point.kind)))
    run = section.family.of(arm)[0]
    numbers = {along: natural(along, value) * (run.steps if along in LENGTHS else 1) for along, value in point.values.items()}
    return Schedule.from_spec(run.schedule | numbers)


def _keys(section: LawSection, point: Point) -> dict[str, Any]:
    if section.kind == "replay":
        return keys_of(section.family.runs[0]) | {"replay": {"fraction": round(point.values[FRACTION], 6)}}
    run = section.family.of(next(iter(section.space.of(point.kind))))[0]
    return keys_of(run) | _schedule_keys(run.schedule, point.values)


def keys_of(run: Trained) -> dict[str, Any]:
    """A run's schedule and replay as config keys."""
    point = schedule_point(run)
    told = _schedule_keys(run.schedule, point.values if point else {})
    return told | {"replay": {"fraction": round(run.replay, 6)} if run.replay else None}


def _schedule_keys(spec: dict[str, Any], values: Mapping[str, float]) -> dict[str, Any]:
    """A schedule as config keys, with the values of a point; lengths are percentages."""
    told: dict[str, Any] = {}
    for name, value in spec.items():
        if name in LENGTHS and (share := values.get(name)) is not None:
            told[_KEYS.get(name, name)] = f"{100 * share:.4g}%"
        elif name in values:
            told[_KEYS.get(name, name)] = float(f"{natural(name, values[name]):.6g}")
        else:
            told[_KEYS.get(name, name)] = value
    return {"schedule": told}


def _what(section: LawSection, point: Point) -> str:
    if section.kind == "replay":
        return describe(section.family.runs[0], {}, point.values[FRACTION])
    run = section.family.of(next(iter(section.space.of(point.kind))))[0]
    shown = {"max_lr", "warmup_steps"}
    for along in point.values:
        levels = section.space.levels(point.kind, along)
        if len(levels) > 1 and along not in shown and not (along == "min_lr" and _tied(section.space, point.kind)):
            shown.add(along)
    return describe(run, {along: point.values[along] for along in point.values if along in shown})


def _tied(space: Space, kind: tuple[str, ...]) -> bool:
    """Whether the minimum rate is the same share of the peak in all arms."""
    ratios = [p.values["min_lr"] - p.values["max_lr"] for p in space.of(kind).values() if {"min_lr", "max_lr"} <= {*p.values}]
    return not ratios or max(ratios) - min(ratios) < 1e-3


def describe(run: Trained, values: dict[str, float], fraction: float | None = None) -> str:
    """'cosine, peak 1e-3, warmup 5%, replay 25%' for a run, some of its numbers replaced by ``values`` of a point."""
    spec = run.schedule
    peak = math.exp(values["max_lr"]) if "max_lr" in values else float(run.rates.max())
    parts = [str(spec.get("curve", "schedule")), f"peak {rate_text(peak)}"]
    warmup = values.get("warmup_steps")
    if warmup is None and isinstance(steps := spec.get("warmup_steps"), int | float):
        warmup = steps / run.steps
    if warmup is not None:
        parts.append(f"warmup {100 * warmup:.3g}%")
    for along, value in values.items():
        if along not in ("max_lr", "warmup_steps"):
            text = rate_text(math.exp(value)) if along in RATES else f"{value:.3g}" if along == "timescale" else f"{value:.3%}"
            parts.append(f"{along} {text}")
    parts.append(f"replay {100 * (run.replay if fraction is None else fraction):.3g}%")
    return ", ".join(parts)


def _trust(section: LawSection) -> list[str]:
    what = "schedules" if section.kind == "schedule" else "replay fractions"
    sentences = []
    for role, trial in section.trials.items():
        levels = len({(arm.along, arm.level or arm.arm) for arm in trial.counted()})
        text = f"{role}: {counted(levels, 'level')} held out inside the tested range"
        if levels:
            text += f", error {trial.error:.3f}, error of the others' mean {trial.error_of_mean:.3f}, band ± {trial.band:.3f}"
        if trial.stuck:
            text += f", parameters at their bounds: {', '.join(trial.stuck)}"
        verdict = "predictions hold within the band" if trial.holds else f"the data are insufficient to predict {what}"
        sentences.append(f"{text}: {verdict}.")
    return sentences


def _few(section: LawSection) -> str:
    """Why no law was fitted."""
    if section.kind == "schedule":
        count = len(distinct_rates(section.family.runs))
        return f"{counted(count, 'schedule')}: at least {annealing.NEEDED} are needed"
    fractions = sorted({run.replay for run in section.family.runs})
    told = ", ".join(f"{fraction:g}" for fraction in fractions)
    return f"{len(fractions)} replay fractions ({told}): at least {replay.NEEDED} are needed"


def _missing(family: Family) -> list[str]:
    return [
        f"These runs share no {role} validation set: that loss is not predicted."
        for role in (UPSTREAM, DOWNSTREAM)
        if role not in family.roles
    ]
