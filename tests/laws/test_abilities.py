"""The advisor on tasks: equal losses with other items lost are named, and the choice stays that of the losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megarewarm.laws.advice import advise, as_json
from tests.support.experiment_runs import STEPS, entry, write_record, write_run
from tests.support.report_runs import task_line

ITEMS = 50
LOST = {"plain": (20, 21, 19), "kept": (4, 5, 4), "same": (20, 22, 18)}
LAST = {"plain": (3.50, 3.53, 3.47), "kept": (3.51, 3.52, 3.50), "same": (3.51, 3.55, 3.47)}


def write_experiment(folder: Path, *, tested: bool = True, digests: dict[str, str] | None = None) -> Path:
    made = []
    for number, seed in enumerate((1, 2, 3)):
        made.append(entry("upstream", seed))
        write_run(folder, made[-1], [5, 3], [5, 4])
        for arm in LOST:
            made.append(entry(arm, seed, after=["upstream"]))
            lost, digest = LOST[arm][number] / ITEMS, (digests or {}).get(arm, "a")
            change: dict[str, Any] = {"lost": lost, "won": 0.04, "lost_beyond": lost - 0.06, "won_beyond": 0.0}
            lines = [task_line(0, "prose", "1" * ITEMS, digest), task_line(STEPS, "prose", "1" * ITEMS, digest) | change]
            write_run(folder, made[-1], [3, 3.01], [4, LAST[arm][number]], more=lines if tested else [])
    return write_record(folder, made)


def test_items_lost_are_told_beside_the_losses(tmp_path: Path) -> None:
    plain = advise(write_experiment(tmp_path / "untested", tested=False)).answers[0]
    advice = advise(write_experiment(tmp_path / "tested"))
    (one,) = advice.answers
    assert one.best == plain.best == "plain" and one.next == plain.next and plain.abilities == {}
    told = [line for line in one.sentences if line not in plain.sentences]
    assert [line for line in one.sentences if line in plain.sentences] == plain.sentences
    # paired differences -16, -16, -15: mean -15.67, and t(2) = 4.3027 times the deviation 0.5774 over sqrt(3)
    assert told == [
        "plain lost 20.0 of 50 items of prose (19 to 21 over 3 seeds) and won 2.0; beyond chance 17.0 lost, 0.0 won. "
        "kept, equal in loss within the seeds, lost 15.7 ± 1.4 fewer.",
        "Tasks don't change the choice, which is by losses.",
    ]
    items = as_json(advice)["answers"][0]["abilities"]["prose"]
    assert items["kept"]["lost"] == pytest.approx(13 / 3) and items["same"]["won"] == pytest.approx(2)


def test_other_items_under_one_name_are_not_compared(tmp_path: Path) -> None:
    advice = advise(write_experiment(tmp_path / "x", digests={"kept": "b"}))
    assert any("tested on 2 different files called prose" in note for note in advice.notes)
    assert not any("fewer" in line for line in advice.answers[0].sentences)
    assert set(advice.answers[0].abilities) == {"prose (a)", "prose (b)"}
