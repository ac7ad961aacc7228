"""What tests on tasks say of a question's arms beside their losses. They change no choice: a limit on items lost is the user's
to set, and few items tell less than a loss."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from megarewarm.laws.arms import Family
from megarewarm.report.numbers.seeds import paired
from megarewarm.report.numbers.tasks import task_labels

Items = dict[str, dict[int | None, float]]
"""``lost``, ``won``, ``lost_beyond`` and ``won_beyond`` in items, ``items`` of the task: each by seed."""


def abilities_of(question: Family) -> dict[str, dict[str, Items]]:
    """By task and arm, from each run's last test on items that it was tested on before its first step."""
    labels = task_labels(key for run in question.runs for key in run.tests)
    found: dict[str, dict[str, Items]] = {}
    for run in question.runs:
        for key, tests in run.tests.items():
            last = tests[-1]
            if None in (shares := {name: getattr(last, name) for name in _CHANGES}).values():
                continue
            own = found.setdefault(labels[key], {}).setdefault(run.arm, {})
            for name, value in {**{name: share * last.items for name, share in shares.items()}, "items": last.items}.items():
                own.setdefault(name, {})[run.seed] = value
    return found


_CHANGES = ("lost", "won", "lost_beyond", "won_beyond")


def sentences(abilities: dict[str, dict[str, Items]], best: str, near: Sequence[str]) -> list[str]:
    """For each task the items that ``best`` lost and won, and which of the arms ``near``, whose losses are equal to its within
    the seeds, lost fewer or more beyond the seeds."""
    told = []
    for task, arms in abilities.items():
        if best not in arms:
            continue
        lost, won, lost_beyond, won_beyond = (list(arms[best][name].values()) for name in _CHANGES)
        over = f" ({min(lost):.0f} to {max(lost):.0f} over {len(lost)} seeds)" if len(lost) > 1 else " (one seed)"
        text = f"{best} lost {fmean(lost):.1f} of {fmean(arms[best]['items'].values()):.0f} items of {task}{over} and won "
        text += f"{fmean(won):.1f}; beyond chance {fmean(lost_beyond):.1f} lost, {fmean(won_beyond):.1f} won"
        for arm in near:
            difference = paired(arms[arm]["lost"], arms[best]["lost"]) if arm in arms else None
            if difference is not None and difference.established:
                word = "fewer" if difference.mean < 0 else "more"
                text += (
                    f". {arm}, equal in loss within the seeds, lost {abs(difference.mean):.1f} ± {difference.margin:.1f} {word}"
                )
        told.append(f"{text}.")
    return [*told, "Tasks don't change the choice, which is by losses."] if told else []
