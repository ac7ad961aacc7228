"""What the fitted laws say of schedules and replay fractions that were not tried, and how far that can be trusted."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from megarewarm.errors import UserError
from megarewarm.laws import annealing, replay
from megarewarm.laws.annealing import AnnealingLaw, fit_annealing
from megarewarm.laws.arms import Family, read_trained, replay_families, schedule_families
from megarewarm.laws.fitting import Trial
from megarewarm.laws.replay import ReplayLaw, fit_replay, largest_new_share
from megarewarm.report.read import DOWNSTREAM, UPSTREAM
from megarewarm.report.words import loss_text, rate_text
from megarewarm.schedules.schedule import Schedule

_SHAPES = ("cosine", "linear", "wsd", "constant")  # curves that need no further number but these
_WSD_DECAY = 0.2  # of the length
_WARMUPS = (0.0, 0.01, 0.02, 0.05, 0.1)  # of the length
_MIN_RATIO = 0.1  # of the peak, where no run says otherwise
_REACH = 1.05  # times the largest sum of rates that was seen


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Final losses in nats per token by role. ``what`` says in words of which schedule or replay fraction; ``keys`` are
    those of a run's file."""

    what: str
    keys: dict[str, Any]
    losses: dict[str, float]

    @property
    def mean(self) -> float:
        return sum(self.losses.values()) / len(self.losses)


@dataclasses.dataclass(frozen=True)
class Section:
    """The advice on one family. ``kind`` is 'schedule' or 'replay'; ``trials`` are empty where nothing could be fitted."""

    kind: str
    family: Family
    laws: dict[str, AnnealingLaw | ReplayLaw]
    predictions: list[Prediction]
    sentences: list[str]

    @property
    def trials(self) -> dict[str, Trial]:
        return {role: law.trial for role, law in self.laws.items()}


@dataclasses.dataclass(frozen=True)
class Advice:
    """``within`` is the share of its start loss by which the upstream loss may rise."""

    title: str
    within: float
    notes: list[str]
    sections: list[Section]


def advise(folder: Path, within: float = 0.02) -> Advice:
    """Fit the laws to the experiment in ``folder``. Raises ``UserError`` where nothing in it can be used at all."""
    if not 0 <= within < 10:
        raise UserError(f"--upstream-within {within:g}: give a share such as 2%, at least 0")
    title, runs, notes = read_trained(folder)
    sections = [_schedules(family, within) for family in schedule_families(runs)]
    if not sections:
        notes.append(
            "no two finished runs differ in the schedule only: sweep schedule.max_lr and schedule.warmup to learn of it"
        )
    replays = replay_families(runs)
    if not replays:
        only = sorted({run.replay for run in runs})
        told = f"one replay fraction only ({only[0]:g})" if len(only) == 1 else "no two runs differ in replay only"
        notes.append(f"{told}: sweep replay.fraction to learn of it")
    sections += [_replay(family, within) for family in replays]
    sections.sort(key=lambda section: not section.laws)
    return Advice(title, within, notes, sections)


def _schedules(family: Family, within: float) -> Section:
    laws = {role: law for role in family.roles if (law := fit_annealing(family, role)) is not None}
    if not laws:
        count = len({tuple(np.round(run.rates, 12)) for run in family.runs})
        few = f"{_count(count, 'schedule')}: at least {annealing.NEEDED} are needed, each left out once; {_next_peak(family)}"
        return Section("schedule", family, {}, [], [few])
    predictions = _grid(family, laws)
    sentences = _missing(family) + [_trust(role, law.trial, "schedules") for role, law in laws.items()]
    if len(laws) == 2 and predictions:
        sentences += _choose(family, laws, predictions, within)
    return Section("schedule", family, dict(laws), predictions, sentences)


def _grid(family: Family, laws: dict[str, AnnealingLaw]) -> list[Prediction]:
    """Final losses over peaks x warmups x curves, within the peaks, warmups and sums of rates that were tried."""
    specs = [run.schedule for run in family.runs if run.schedule.get("max_lr")]
    if not specs:
        return []
    steps = Counter(run.steps for run in family.runs).most_common(1)[0][0]
    tried = sorted({float(spec["max_lr"]) for spec in specs})
    peaks = sorted({*tried, *(math.sqrt(a * b) for a, b in itertools.pairwise(tried))})
    shares = {float(spec.get("warmup_steps", 0.0)) / float(spec["length"]) for spec in specs}
    warmups = sorted({round(share, 4) for share in shares} | {share for share in _WARMUPS if share <= max(shares)})
    ratios = Counter(round(spec["min_lr"] / spec["max_lr"], 6) for spec in specs if spec.get("min_lr"))
    ratio = ratios.most_common(1)[0][0] if ratios else _MIN_RATIO
    seen = max(float(run.rates.sum()) for run in family.runs)
    found = []
    for shape in _SHAPES:
        for peak in peaks:
            for warmup in warmups:
                keys = {"curve": shape, "max_lr": peak, "warmup": f"{100 * warmup:g}%"}
                schedule = Schedule(
                    curve=shape,
                    max_lr=peak,
                    warmup_steps=warmup * steps,
                    length=float(steps),
                    min_lr=None if shape == "constant" else ratio * peak,
                    decay=_WSD_DECAY * steps if shape == "wsd" else None,
                    decay_shape="minus_sqrt" if shape == "wsd" else None,
                )
                rates = schedule.values(np.arange(steps))
                if rates.sum() > _REACH * seen:
                    continue
                if shape != "constant":
                    keys["min_lr"] = ratio * peak
                if shape == "wsd":
                    keys |= {"decay": f"{100 * _WSD_DECAY:g}%", "decay_shape": "minus_sqrt"}
                what = f"{shape}, peak {rate_text(peak)}, warmup {100 * warmup:g}%"
                losses = {}
                for role, law in laws.items():
                    ends = [run.start(role) + law.change(rates, run.rate_before, run.sum_before)[-1] for run in _starts(family)]
                    losses[role] = float(np.mean(ends))
                found.append(Prediction(what, {"schedule": keys}, losses))
    return found


def _starts(family: Family) -> list[Any]:
    """One run of every seed, for where it starts from."""
    return list({run.seed: run for run in family.runs}.values())


def _choose(family: Family, laws: dict[str, AnnealingLaw], predictions: list[Prediction], within: float) -> list[str]:
    """A recommendation, or that there is none."""
    if not all(law.trial.holds for law in laws.values()):
        return [f"So nothing is recommended: the data don't suffice. What would help most: {_next_peak(family)}."]
    limit = family.mean_start(UPSTREAM) * (1 + within)
    measured = {arm: {role: family.mean_final(arm, role) for role in laws} for arm in family.arms}
    allowed = [one for one in predictions if one.losses[UPSTREAM] <= limit]
    sentences = []
    if allowed:
        best, aim = min(allowed, key=lambda one: one.losses[DOWNSTREAM]), DOWNSTREAM
        rivals = {arm: losses[DOWNSTREAM] for arm, losses in measured.items() if losses[UPSTREAM] <= limit}
        value, error = best.losses[DOWNSTREAM], laws[DOWNSTREAM].trial.band
        sure = best.losses[UPSTREAM] + laws[UPSTREAM].trial.band <= limit
        sentences.append(
            f"Lowest predicted downstream loss with the upstream loss within {within:.3g} of its start ({loss_text(limit)}): "
            f"{_told(best, laws)}" + ("." if sure else "; the band of the upstream loss reaches beyond the limit.")
        )
    else:
        least = min(predictions, key=lambda one: one.losses[UPSTREAM])
        sentences.append(
            f"No schedule here keeps the upstream loss within {within:.1%} of its start ({loss_text(limit)}); the lowest that "
            f"is predicted is {_told(least, laws)}. Replay does what a schedule can't."
        )
        best, aim = min(predictions, key=lambda one: one.mean), "mean of both"
        rivals = {arm: sum(losses.values()) / 2 for arm, losses in measured.items()}
        value, error = best.mean, math.hypot(*(law.trial.band for law in laws.values())) / 2
        sentences.append(f"Lowest predicted mean of both losses, {loss_text(value)}: {_told(best, laws)}.")
    if not rivals:
        return [*sentences, f"No run that was made keeps to the limit; try this one: {best.what}."]
    rival = min(rivals, key=lambda arm: rivals[arm])
    gain = rivals[rival] - value
    if gain > error:
        sentences.append(
            f"Recommended: {best.what}. Its {aim} is predicted {gain:.3f} below that of {rival} ({loss_text(rivals[rival])}), "
            f"the best that was run, which is more than the band of {error:.3f}."
        )
    else:
        sentences.append(
            f"That is {abs(gain):.3f} {'below' if gain > 0 else 'above'} what {rival} measured ({loss_text(rivals[rival])}), "
            f"the best that was run, and within the band of {error:.3f}: the data don't suffice to prefer it. "
            + ("The run that would tell: " + best.what + "." if gain > 0 else f"Stay with {rival}.")
        )
    return sentences


def _replay(family: Family, within: float) -> Section:
    laws = {role: law for role in family.roles if (law := fit_replay(family, role)) is not None}
    fractions = sorted({run.replay for run in family.runs})
    if not laws:
        told = ", ".join(f"{fraction:g}" for fraction in fractions)
        gap = max(itertools.pairwise(fractions), key=lambda pair: pair[1] - pair[0])
        few = f"{len(fractions)} replay fractions ({told}): at least {replay.NEEDED} are needed; try {sum(gap) / 2:.2g}"
        return Section("replay", family, {}, [], [few])
    shown = sorted({*fractions, *(f for f in (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5) if f < fractions[-1])})
    predictions = [
        Prediction(
            f"replay {100 * fraction:g}%",
            {"replay": {"fraction": fraction}},
            {role: float(law.loss(np.array([fraction]))[0]) for role, law in laws.items()},
        )
        for fraction in shown
        if fraction >= fractions[0]
    ]
    sentences = _missing(family) + [_trust(role, law.trial, "fractions") for role, law in laws.items()]
    if (law := laws.get(UPSTREAM)) is not None:
        sentences += _share(family, law, laws.get(DOWNSTREAM), within)
    return Section("replay", family, dict(laws), predictions, sentences)


def _share(family: Family, law: ReplayLaw, downstream: ReplayLaw | None, within: float) -> list[str]:
    """The largest share of new data that keeps the upstream loss within the limit."""
    limit = family.mean_start(UPSTREAM) * (1 + within)
    share = largest_new_share(law, limit)
    gaps = sorted({run.replay for run in family.runs})
    if not law.trial.holds:
        low, high = max(itertools.pairwise(gaps), key=lambda pair: pair[1] - pair[0])
        most = f"What would help most: replay.fraction {(low + high) / 2:.2g}."
        return [f"So no fraction is recommended: the data don't suffice. {most}"]
    if share is None:
        end = float(law.loss(np.array([law.high]))[0])
        return [
            f"No fraction up to {law.high:g} keeps the upstream loss within {within:.1%} of its start ({loss_text(limit)}): at "
            f"{law.high:g} it is predicted at {loss_text(end)} ± {law.trial.band:.3f}. A lower peak helps, or more replay."
        ]
    careful = largest_new_share(law, limit - law.trial.band)
    text = (
        f"Largest share of new data with the upstream loss within {within:.1%} of its start ({loss_text(limit)}): {share:.1%}"
    )
    if careful is None:
        text += (
            f", replay {1 - share:.1%}; with the band of {law.trial.band:.3f} against it, no fraction that was tried is safe"
        )
    elif careful < share:
        text += f", replay {1 - share:.1%}; replay {1 - careful:.1%} to be safe within the band of {law.trial.band:.3f}"
    if downstream is not None:
        cost = float(downstream.loss(np.array([1 - share]))[0] - downstream.loss(np.array([law.low]))[0])
        known = "more" if abs(cost) > downstream.trial.band else "no more"
        text += f". Its cost downstream against replay {100 * law.low:g}%: {cost:+.3f}, "
        text += f"{known} than the band of {downstream.trial.band:.3f}"
    return [text + "."]


def _trust(role: str, trial: Trial, what: str) -> str:
    counted = sum(arm.inside for arm in trial.arms)
    text = (
        f"{role}: over {counted} held-out {what} the law's error is {trial.error:.3f}, that of the others' mean "
        f"{trial.error_of_mean:.3f}"
    )
    return f"{text}: predictions hold within ± {trial.band:.3f}." if trial.holds else f"{text}: the law doesn't predict here."


def _missing(family: Family) -> list[str]:
    return [
        f"No {role} validation set in all of these runs: nothing is said of that loss."
        for role in (UPSTREAM, DOWNSTREAM)
        if role not in family.roles
    ]


def _next_peak(family: Family) -> str:
    """The peak in the widest gap between those that were tried."""
    peaks = sorted({float(run.rates.max()) for run in family.runs})
    if len(peaks) == 1:
        return f"a run with schedule.max_lr {rate_text(peaks[0] / 2)} and one with {rate_text(peaks[0] * 2)}"
    low, high = max(itertools.pairwise(peaks), key=lambda pair: pair[1] / pair[0])
    return f"a run with schedule.max_lr {rate_text(math.sqrt(low * high))}"


def _told(prediction: Prediction, laws: dict[str, AnnealingLaw]) -> str:
    losses = ", ".join(f"{role} {loss_text(loss)} ± {laws[role].trial.band:.3f}" for role, loss in prediction.losses.items())
    return f"{prediction.what} ({losses})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def as_json(advice: Advice) -> dict[str, Any]:
    """Everything, as JSON values; losses in nats per token."""
    return {
        "format": 1,
        "experiment": advice.title,
        "upstream_within": advice.within,
        "notes": advice.notes,
        "sections": [
            {
                "kind": section.kind,
                "arms": section.family.arms,
                "runs": len(section.family.runs),
                "start": {role: section.family.mean_start(role) for role in section.family.roles},
                "laws": {role: _law_json(law) for role, law in section.laws.items()},
                "predictions": [{"keys": one.keys, "losses": one.losses} for one in section.predictions],
                "sentences": section.sentences,
            }
            for section in advice.sections
        ],
    }


def _law_json(law: AnnealingLaw | ReplayLaw) -> dict[str, Any]:
    if isinstance(law, AnnealingLaw):
        names = ("A", "a", "x0", "C", "B", "E", "b")
        told: dict[str, Any] = {"lambda": law.choice.memory, "rate_before": "own" if law.choice.own_rate else "checkpoint"}
        told |= {"s1_unit": law.unit, "s2_unit": law.area_unit}
    else:
        names = ("E", "B", "n", "b", "C", "e", "g")
        told = {"tokens_unit": law.unit, "fractions": [law.low, law.high]}
    told["parameters"] = dict(zip(names, law.parameters.tolist(), strict=True))
    trial = law.trial
    told["held_out"] = [dataclasses.asdict(arm) for arm in trial.arms]
    numbers = {"error": trial.error, "error_of_mean": trial.error_of_mean, "band": trial.band}
    return told | {key: value if math.isfinite(value) else None for key, value in numbers.items()}
