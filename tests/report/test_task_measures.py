"""Tests on tasks over the seeds of an experiment: accuracies, items lost and won; tasks of one name that are not the same."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from megarewarm.report.numbers.tasks import task_labels
from megarewarm.report.pages import experiment_page
from megarewarm.report.pages.run_page import report
from tests.support.experiment_runs import STEPS, entry, write_record, write_run
from tests.support.report_runs import task_line

BEFORE = "1111100000"
NOW = {("none", 1): "1100011000", ("none", 2): "1110000000", ("replay", 1): "1111000000", ("replay", 2): "1111110000"}


def write_tested(folder: Path, digests: dict[str, str] | None = None) -> Path:
    """Two arms of two seeds, tested before the first step and after the last."""
    made = []
    for seed in (1, 2):
        upstream = entry("upstream", seed)
        write_run(folder, upstream, [5, 3], [5, 4])
        made.append(upstream)
        for arm in ("none", "replay"):
            run = entry(arm, seed, after=["upstream"])
            digest = (digests or {}).get(arm, "a")
            now = NOW[arm, seed]
            lost, won = (sum(a + b == change for a, b in zip(BEFORE, now, strict=True)) / 10 for change in ("10", "01"))
            changes = {"lost": lost, "won": won, "lost_beyond": lost / 2, "won_beyond": 0.0}
            more = [task_line(0, "a<b", BEFORE, digest), task_line(STEPS, "a<b", now, digest) | changes]
            write_run(folder, run, [3, 3.2], [4, 3.5], more=more)
            made.append(run)
    return write_record(folder, made)


def table(path: Path) -> dict[str, dict[str, Any]]:
    return {row["arm"]: row for row in json.loads(path.read_text())}


def test_an_experiment_shows_accuracies_and_items_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment_page, "_pictures", lambda *_: [])
    page = experiment_page.report_experiment(write_tested(tmp_path / "x"), tmp_path / "report").read_text()
    none = table(tmp_path / "report/arms.json")["none"]
    ends = [NOW["none", seed].count("1") / 10 for seed in (1, 2)]
    assert none["task_a<b_after_mean"] == pytest.approx(fmean(ends))
    assert none["task_a<b_after_deviation"] == pytest.approx(stdev(ends))
    assert (none["task_a<b_after_lowest"], none["task_a<b_after_highest"]) == (min(ends), max(ends))
    assert none["task_a<b_lost_mean"] == pytest.approx((3 + 2) / 2) and none["task_a<b_won_mean"] == pytest.approx(1)
    assert none["task_a<b_lost_beyond_mean"] == pytest.approx(1.25) and none["task_a<b_items_mean"] == 10
    assert table(tmp_path / "report/arms.json")["upstream"]["task_a<b_after_mean"] is None
    assert ">Task a&lt;b</th>" in page and 'data-key="task_a&lt;b_lost"' in page and "task_a<b" not in page
    assert '<td data-value="2.5">2.5<small>± 0.7</small></td>' in page and ">50.0%<" in page
    with open(tmp_path / "report/runs.csv", encoding="utf-8") as file:
        runs = {row["run"]: row for row in csv.DictReader(file)}
    assert [runs[name]["task_a<b_lost"] for name in ("none.s1", "replay.s2", "upstream.s1")] == ["3.0", "0.0", ""]


def test_files_of_one_name_with_other_items_are_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment_page, "_pictures", lambda *_: [])
    folder = write_tested(tmp_path / "x", {"none": "0123456789abcdef", "replay": "fedcba9876543210"})
    page = experiment_page.report_experiment(folder, tmp_path / "report").read_text()
    arms = table(tmp_path / "report/arms.json")
    assert arms["none"]["task_a<b (012345)_after_finite"] == 2 and arms["none"]["task_a<b (fedcba)_after_finite"] == 0
    told = "The runs were tested on 2 different files called a&lt;b"
    assert told in page and ">Task a&lt;b (012345)</th>" in page
    runs = [folder / "seed_1" / arm for arm in ("none", "replay")]
    page = report(runs, tmp_path / "runs").read_text()
    assert told in page and "<td>a&lt;b (012345)</td>" in page and "replay.s1 on a&lt;b (fedcba): 50.0 %" in page
    rows = {row["run"]: row for row in json.loads((tmp_path / "runs/table.json").read_text())}
    assert rows["none.s1"]["task_a<b (012345)_lost"] == 3 and rows["none.s1"]["task_a<b (fedcba)_lost"] is None


def test_a_name_is_enough_where_the_items_are_the_same() -> None:
    assert task_labels([("a", "1"), ("b", "2"), ("a", "1")]) == {("a", "1"): "a", ("b", "2"): "b"}
