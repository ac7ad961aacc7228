"""A measure added from outside, as CONTRIBUTING says: one row of the table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from megarewarm.record.run import read_runs
from megarewarm.report.numbers.measure import MEASURES, Measure
from megarewarm.report.numbers.runs import RunRow
from megarewarm.report.pages import experiment_page
from megarewarm.report.pages.run_page import report
from megarewarm.report.pages.terminal_table import summary_table
from megarewarm.spelling import signed_text
from tests.support import experiment_runs, report_runs


def net_gain(row: RunRow) -> float | None:
    """What was learned beyond what was forgotten, in nats per token."""
    return None if row.adaptation is None or row.forgetting is None else row.adaptation - row.forgetting


NET = Measure(
    "net_gain",
    net_gain,
    "Net gain",
    text=signed_text,
    runs=True,
    file="net_gain",
    terminal=("net", lambda row: signed_text(net_gain(row))),
)


@pytest.fixture(autouse=True)
def with_net() -> Iterator[None]:
    MEASURES.append(NET)
    yield
    MEASURES.remove(NET)


def test_it_is_in_the_page_of_runs_the_terminal_and_the_files(tmp_path: Path) -> None:
    folders = report_runs.write_arms(tmp_path / "runs", ["prose_pretrain", "rewarm", "rewarm_half"])
    page = report(folders, tmp_path / "report").read_text()
    assert '<th rowspan="2" scope="col">Net gain</th>' in page
    rows = json.loads((tmp_path / "report/table.json").read_text())
    assert rows[0]["net_gain"] is None
    for row in rows[1:]:
        assert row["net_gain"] == pytest.approx(row["adaptation"] - row["forgetting"])
        assert f"<td>{signed_text(row['net_gain'])}</td>" in page
    with open(tmp_path / "report/table.csv", encoding="utf-8") as file:
        assert [row["net_gain"] for row in csv.DictReader(file)] == ["", *(str(row["net_gain"]) for row in rows[1:])]
    console = Console(file=io.StringIO(), width=100)
    console.print(summary_table(read_runs(folders)))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "net" in printed.split("\n")[1] and all(signed_text(row["net_gain"]) in printed for row in rows[1:])


def test_it_is_in_an_experiment_over_its_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment_page, "_pictures", lambda *_: [])  # most of the time
    experiment_runs.write_grid(tmp_path / "grid")
    page = experiment_page.report_experiment(tmp_path / "grid", tmp_path / "report").read_text()
    assert 'data-key="net_gain"' in page and ">Net gain</th>" in page
    arms = json.loads((tmp_path / "report/arms.json").read_text())
    runs = json.loads((tmp_path / "report/runs.json").read_text())
    (arm,) = (arm for arm in arms if arm["arm"] == "rewarm")
    gains = [run["net_gain"] for run in runs if run["arm"] == "rewarm"]
    assert len(gains) == arm["net_gain_finite"] == 3 and arm["net_gain_mean"] == pytest.approx(sum(gains) / 3)
    assert arm["net_gain_mean"] == pytest.approx(arm["adaptation_mean"] - arm["forgetting_mean"])
    assert f'<td data-value="{arm["net_gain_mean"]!r}">{signed_text(arm["net_gain_mean"])}<small>' in page
