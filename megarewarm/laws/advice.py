"""Predictions of new runs from an experiment's finished runs, and how far to trust them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from megarewarm.errors import UserError
from megarewarm.laws.annealing import AnnealingLaw
from megarewarm.laws.answer import Recommendation, answer, share_of_new_data
from megarewarm.laws.arms import questions, read_trained, replay_families, schedule_families
from megarewarm.laws.replay import ReplayLaw
from megarewarm.laws.sections import LawSection, Prediction, sections_of


@dataclasses.dataclass(frozen=True)
class Advice:
    """``within`` is the share of its start value by which the upstream loss may rise. There is one answer per question, which
    is a set of runs with comparable losses."""

    title: str
    within: float
    notes: list[str]
    answers: list[Recommendation]

    @property
    def sections(self) -> list[LawSection]:
        """The laws of all answers, fitted ones first."""
        found = [section for one in self.answers for section in one.sections]
        return sorted(found, key=lambda section: not section.laws)


def advise(folder: Path, within: float = 0.02, progress: Callable[[str], None] = lambda _: None) -> Advice:
    """Fit the laws to the experiment in ``folder``. Raises ``UserError`` if no run in it can be used.

    ``progress`` is called with a description of the next step: the fits take seconds to minutes.
    """
    if not 0 <= within < 10:
        raise UserError(f"--upstream-within {within:g}: give a share such as 2%, at least 0")
    title, runs, notes = read_trained(folder)
    answers = []
    for question in questions(runs):
        compared = [*question.runs, *question.diverged]
        sections = sections_of(schedule_families(compared), replay_families(compared), progress)
        for section in sections:
            section.sentences.extend(share_of_new_data(section, within) if section.kind == "replay" else [])
        answers.append(answer(question, sections, within))
    if not any(section.kind == "schedule" for one in answers for section in one.sections):
        notes.append(
            "no two finished runs differ only in the schedule: sweep schedule.max_lr and schedule.warmup to learn its effect"
        )
    if not any(section.kind == "replay" for one in answers for section in one.sections):
        only = sorted({round(run.replay, 6) for run in runs})
        told = f"only one replay fraction ({only[0]:g})" if len(only) == 1 else "no two runs differ only in replay"
        notes.append(f"{told}: sweep replay.fraction to learn its effect")
    if len(answers) > 1:
        notes.append(
            f"{len(answers)} groups of runs differ in start, budget or validation sets: losses are compared only within a group"
        )
    return Advice(title, within, notes, answers)


def as_json(advice: Advice) -> dict[str, Any]:
    """The whole advice as JSON values; losses in nats per token, or as ``notes`` say."""
    return {
        "format": 1,
        "experiment": advice.title,
        "upstream_within": advice.within,
        "notes": advice.notes,
        "answers": [_answer_json(one) for one in advice.answers],
        "sections": [
            {
                "kind": section.kind,
                "arms": section.family.arms,
                "runs": len(section.family.runs),
                "start": {role: section.family.mean_start(role) for role in section.family.roles},
                "laws": {role: _law_json(law) for role, law in section.laws.items()},
                "predictions": [_prediction_json(one) for one in section.predictions],
                "sentences": section.sentences,
            }
            for section in advice.sections
        ],
    }


def _answer_json(one: Recommendation) -> dict[str, Any]:
    return {
        "arms": one.measured,
        "start": {role: one.question.mean_start(role) for role in one.question.roles},
        "upstream_limit": one.limit,
        "aim": one.aim,
        "best": one.best,
        "recommended": _prediction_json(one.next) if one.next else None,
        "sentences": one.sentences,
        "abilities": {
            task: {arm: {name: fmean(each.values()) for name, each in items.items()} for arm, items in arms.items()}
            for task, arms in one.abilities.items()
        },
    }


def _prediction_json(one: Prediction) -> dict[str, Any]:
    """``arm`` is null for a new run."""
    return {"arm": one.arm, "keys": one.keys, "losses": one.losses, "bands": one.bands}


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
    told["holds"] = trial.holds
    told["held_out"] = [dataclasses.asdict(arm) for arm in trial.arms]
    numbers = {"error": trial.error, "error_of_mean": trial.error_of_mean, "band": trial.band}
    return told | {key: value if math.isfinite(value) else None for key, value in numbers.items()}
