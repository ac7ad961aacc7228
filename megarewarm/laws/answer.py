"""The answer to a question: the best measured arm, and the run worth making next, if the laws can predict one."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from megarewarm.laws import abilities
from megarewarm.laws.abilities import Items
from megarewarm.laws.arms import Family
from megarewarm.laws.fitting import quantile
from megarewarm.laws.replay import ReplayLaw, largest_new_share
from megarewarm.laws.sections import LawSection, Prediction, describe
from megarewarm.laws.support import FRACTION, Space, natural
from megarewarm.record.run import DOWNSTREAM, UPSTREAM
from megarewarm.spelling import loss_text, rate_text

MEAN = "mean of both losses"
_NAMED = 4  # arms named in a sentence
_SAME = 0.005  # nats: losses that differ by less count as equal, as in the report


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """``question`` holds the compared arms, ``measured`` their final losses by role, ``aim`` the quantity that ``best``
    minimizes: a role's loss or the mean of both. ``limit`` bounds the upstream loss, ``None`` without one. ``next`` is a new
    run, predicted to improve on ``best`` by more than its band; ``sentences`` state all of this. ``abilities``:
    items lost and won, by task and arm."""

    question: Family
    sections: list[LawSection]
    measured: dict[str, dict[str, float]]
    limit: float | None
    aim: str
    best: str
    next: Prediction | None
    sentences: list[str]
    abilities: dict[str, dict[str, Items]]


def answer(question: Family, sections: Sequence[LawSection], within: float) -> Recommendation:
    """Judge the arms of ``question`` by their measured final losses, and compare the predictions with the best of them."""
    measured = {arm: {role: question.mean_final(arm, role) for role in question.roles} for arm in question.arms}
    limit = question.mean_start(UPSTREAM) * (1 + within) if UPSTREAM in question.roles else None
    allowed = [arm for arm in measured if limit is None or measured[arm][UPSTREAM] <= limit]
    aim = question.roles[0] if len(question.roles) == 1 else DOWNSTREAM if allowed else MEAN
    able = allowed if aim == DOWNSTREAM else list(measured)
    best = min(able, key=lambda arm: aimed(measured[arm], aim))
    near, known = _near(question, able, best, aim)
    items = abilities.abilities_of(question)
    sentences = [_best(question, measured, best, aim, limit, within, len(able)), *_noise(able, near, known)]
    sentences += abilities.sentences(items, best, near if known else ())
    chosen, told = _next(question, sections, measured[best], best, aim, limit)
    return Recommendation(
        question, list(sections), measured, limit, aim, best, chosen, [*sentences, *told, *_edges(question, best)], items
    )


def aimed(losses: dict[str, float], aim: str) -> float:
    """The quantity to minimize: a role's loss, or the mean of both."""
    return sum(losses.values()) / len(losses) if aim == MEAN else losses[aim]


def _best(
    question: Family, measured: dict[str, dict[str, float]], best: str, aim: str, limit: float | None, within: float, able: int
) -> str:
    losses = ", ".join(f"{role} {loss_text(loss)}" for role, loss in measured[best].items())
    named = f"{best} ({describe(question.of(best)[0], {})}): {losses}"
    if len(measured) == 1:
        return f"One arm, and nothing to compare it with: {named}."
    text = f"Best of {len(measured)} arms: {named}"
    if len(question.roles) < 2:
        return f"{text}; the lowest {aim} loss."
    bound = f"within {within:.3g} of" if within >= 1 else f"within {100 * within:.3g}% of"
    start = f"{bound} its start value ({loss_text(question.mean_start(UPSTREAM))}; limit {loss_text(limit)})"
    if aim == MEAN:
        return f"{text}; the lowest {aim}, {loss_text(aimed(measured[best], aim))}. No arm keeps the upstream loss {start}."
    if able == 1:
        return f"{text}; the only arm that keeps the upstream loss {start}."
    return f"{text}; the lowest downstream loss of the {able} arms that keep the upstream loss {start}."


def _near(question: Family, able: Sequence[str], best: str, aim: str) -> tuple[list[str], bool]:
    """(other arms whose difference from the best is within seed noise, whether that is known)"""
    changes = {
        arm: [aimed({role: run.final(role) - run.start(role) for role in question.roles}, aim) for run in question.of(arm)]
        for arm in able
    }
    several = [values for values in changes.values() if len(values) > 1]
    freedom = sum(len(values) - 1 for values in several)
    if not freedom:
        means = {arm: float(np.mean(values)) for arm, values in changes.items()}
        return [arm for arm in able if arm != best and means[arm] - means[best] <= _SAME], False
    spread = math.sqrt(sum(float(np.var(values)) * len(values) for values in several) / freedom)
    return [
        arm
        for arm, values in changes.items()
        if arm != best
        and np.mean(values) - np.mean(changes[best])
        <= quantile(freedom) * spread * math.sqrt(1 / len(values) + 1 / len(changes[best]))
    ], True


def _noise(able: Sequence[str], near: Sequence[str], known: bool) -> list[str]:
    """Which arms are within seed noise of the best."""
    named = f"{', '.join(near[:_NAMED])}{_more(len(near) - _NAMED)}"
    if len(able) > 1 and not known:
        also = f"; within {_SAME:g} of the best: {named}" if near else ""
        return [f"Every arm was run with one seed, so the seed noise is unknown{also}."]
    return [f"Within seed noise of the best: {named}."] if near else []


def _next(
    question: Family, sections: Sequence[LawSection], losses: dict[str, float], best: str, aim: str, limit: float | None
) -> tuple[Prediction | None, list[str]]:
    """The run predicted to improve on the best by more than its band; otherwise what the data allow to conclude."""
    known = [
        one for section in sections for one in section.predictions if one.arm is None and set(one.losses) == set(question.roles)
    ]
    if not known:
        return None, [_not_enough(question, sections, best)]
    kept = known
    if aim == DOWNSTREAM and limit is not None and len(question.roles) > 1:
        kept = [one for one in known if one.losses[UPSTREAM] + one.bands[UPSTREAM] <= limit]
    gains = [(aimed(losses, aim) - aimed(one.losses, aim), aimed(one.bands, aim), one) for one in kept]
    name = aim if aim == MEAN else f"{aim} loss"
    if better := [entry for entry in gains if entry[0] > entry[1]]:
        gain, band, one = max(better, key=lambda entry: entry[0] - entry[1])
        return one, [
            f"Recommended next: {_told(one)}. Its {name} is predicted {gain:.3f} below that of {best}, more than the band of "
            f"{band:.3f}."
        ]
    if open_ones := [entry for entry in gains if entry[0] > 0]:
        gain, band, one = max(open_ones, key=lambda entry: entry[0])
        return None, [
            f"Most informative next run: {_told(one)}. Its {name} is predicted {gain:.3f} below that of {best}, within "
            f"the band of {band:.3f}: the data are insufficient to prefer it."
        ]
    within = "" if kept else " and to keep the upstream loss plus its band within the limit"
    return None, [f"Within the tested range no new run is predicted to be better{within}: stay with {best}."]


def _not_enough(question: Family, sections: Sequence[LawSection], best: str) -> str:
    reasons = []
    for kind, what in (("schedule", "schedules"), ("replay", "replay fractions")):
        same = [section for section in sections if section.kind == kind]
        if not same:
            continue
        if all(not section.laws for section in same):
            reasons.append(f"{what} (too few: {same[0].sentences[0]})")
        else:
            reasons.append(f"{what} (the law's error on held-out levels is too large, or no value lies between levels)")
    told = " or ".join(reasons) if reasons else "other runs (no two arms differ only in the schedule or only in replay)"
    return f"The data are insufficient to predict {told}. Choose among the measured arms. {_try(question, best)}"


def _try(question: Family, best: str) -> str:
    """What would help: the middle of the widest gap along a direction, or a direction not varied yet."""
    space = Space.of_schedules(question)
    like = [run for run in question.runs if run.arm == best]
    kind = space.points[best].kind if best in space.points else None
    peaks = space.levels(kind, "max_lr") if kind else []
    fractions = Space.of_replay(question).levels((FRACTION,), FRACTION)
    told = []
    if len(peaks) > 1:
        low, high = max(itertools.pairwise(peaks), key=lambda pair: pair[1] - pair[0])
        told.append(f"schedule.max_lr {rate_text(natural('max_lr', (low + high) / 2))}")
    if len(fractions) > 1:
        low, high = max(itertools.pairwise(fractions), key=lambda pair: pair[1] - pair[0])
        told.append(f"replay.fraction {(low + high) / 2:.2g}")
    if told:
        return f"What would help most: runs with {' and with '.join(told)}, all else as in {best}."
    only = f"only {rate_text(float(like[0].rates.max()))} and replay {100 * like[0].replay:g}% were tried"
    return f"What would help: a sweep over schedule.max_lr or replay.fraction ({only})."


def _edges(question: Family, best: str) -> list[str]:
    """Where the best arm is at the edge of the tested range, and a value beyond it."""
    run = question.of(best)[0]
    told, beyond = [], []
    peak, fraction = float(run.rates.max()), run.replay
    for name, key, own, values, further in (
        ("peak", "schedule.max_lr", peak, [float(other.rates.max()) for other in question.runs], 2 * peak),
        ("replay fraction", "replay.fraction", fraction, [other.replay for other in question.runs], (1 + fraction) / 2),
    ):
        if max(values) <= min(values) * 1.0001:
            continue
        for word, end, next_one in (("highest", max(values), further), ("lowest", min(values), own / 2)):
            if math.isclose(own, end, rel_tol=1e-4) and not (name == "replay fraction" and end == 0):
                told.append(f"the {word} {name}")
                beyond.append(f"{key} {rate_text(next_one) if name == 'peak' else f'{next_one:.3g}'}")
    if not told:
        return []
    text = f"{best} has {' and '.join(told)} of the tested range, and the laws predict nothing beyond it"
    return [f"{text}: try {' and '.join(beyond)}."]


def share_of_new_data(section: LawSection, within: float) -> list[str]:
    """The largest share of new data that keeps the upstream loss within the limit, if the replay law holds."""
    law = section.laws.get(UPSTREAM)
    if not isinstance(law, ReplayLaw) or not law.trial.holds:
        return []
    start = section.family.mean_start(UPSTREAM)
    limit = start * (1 + within)
    gaps = section.space.between((FRACTION,), FRACTION)
    bound = f"{100 * within:.3g}% of its start value ({loss_text(start)}; limit {loss_text(limit)})"
    share = largest_new_share(law, limit, gaps)
    if share is None:
        end = float(law.loss(np.array([law.high]))[0])
        return [
            f"No fraction up to {law.high:g} keeps the upstream loss within {bound}: at {law.high:g} it is predicted at "
            f"{loss_text(end)} ± {law.trial.band:.3f}."
        ]
    careful = largest_new_share(law, limit - law.trial.band, gaps)
    text = f"Largest share of new data with the upstream loss within {bound}: {share:.1%}, replay {1 - share:.1%}"
    if careful is None:
        text += f"; with the band of {law.trial.band:.3f} as a margin, no tested fraction is safe"
    elif careful < share:
        text += f"; replay {1 - careful:.1%} with the band of {law.trial.band:.3f} as a margin"
    downstream = section.laws.get(DOWNSTREAM)
    if isinstance(downstream, ReplayLaw) and downstream.trial.holds:
        cost = float(downstream.loss(np.array([1 - share]))[0] - downstream.loss(np.array([law.low]))[0])
        known = "more" if abs(cost) > downstream.trial.band else "no more"
        text += f". Its downstream cost relative to replay {100 * law.low:g}%: {cost:+.3f}, "
        text += f"{known} than the band of {downstream.trial.band:.3f}"
    return [text + "."]


def _told(prediction: Prediction) -> str:
    losses = ", ".join(f"{role} {loss_text(loss)} ± {prediction.bands[role]:.3f}" for role, loss in prediction.losses.items())
    return f"{prediction.what} ({losses})"


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""
