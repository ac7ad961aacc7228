"""Bars on consoles: one line of 80 columns on a terminal, lines now and then in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from megarewarm import console
from megarewarm.console import WorkShown, make_bar


def test_a_bar_is_one_line_on_a_terminal_and_nothing_elsewhere() -> None:
    for terminal in (True, False):
        shown = Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None)
        with make_bar(shown) as bar:
            task = bar.add_task("retraining the steps before step 1,000,000", total=4)
            bar.advance(task, 3)
            bar.refresh()
        assert isinstance(shown.file, io.StringIO)
        lines = shown.file.getvalue().splitlines()
        assert any("retraining" in line and "75%" in line for line in lines) == terminal
        assert all(len(line.split("\x1b[2K")[-1]) <= 80 for line in lines)


def test_work_in_a_log_is_told_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    shown = Console(file=io.StringIO(), width=80)
    work = WorkShown(shown)
    work.finish()
    for done, seconds in ((10, 0.0), (30, 10.0), (70, 21.0), (80, 1.0), (100, 30.0)):
        now[0] += seconds
        work.show("reading", done, 200, lambda spent, since: f"{since / spent:.2f} a second")
    now[0] += 1
    work.show("counting", 0, 0, lambda spent, since: "")
    now[0] += 40
    work.show("counting", 5, 0, lambda spent, since: f"{since} in {spent:.0f} s")
    work.finish()
    assert isinstance(shown.file, io.StringIO)
    assert shown.file.getvalue().splitlines() == [
        "reading: 35 %, 1.94 a second",
        "reading: 50 %, 1.45 a second",
        "counting: 5 in 40 s",
    ]
