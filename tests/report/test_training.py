"""How runs trained: the figure of their steps, and the table of when and on what."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megarewarm.record.run import RecordedRun, read_run, read_runs
from megarewarm.report.figures.lines import Line, lines_of
from megarewarm.report.figures.training import describe_training, draw_training, medians
from megarewarm.report.numbers.runs import rows, wall_time
from megarewarm.report.pages.run_page import report
from tests.report.test_page import assert_legible, check
from tests.support.report_runs import config, lines, train_line, write

BEGAN = 1795860000.0  # 2026-11-28 UTC


def noisy(folder: Path, name: str, steps: int = 400, **start: Any) -> Path:
    """A run with noise in every step, and one step far out; each step takes 2 seconds."""
    rng = np.random.default_rng(steps)
    events = []
    for event in lines(name, steps):
        event = event | {"time": BEGAN + 2 * event.get("step", 0)}
        if event["event"] == "start":
            event |= start
        if event["event"] == "train":
            event |= {"grad_norm": float(rng.lognormal(0, 0.3)), "tokens_per_second": float(rng.normal(1.2e5, 3e3))}
            if event["step"] == steps // 2:
                event |= {"loss": 50.0, "grad_norm": 900.0, "tokens_per_second": 10.0}
        events.append(event)
    return write(folder / name, events, config(name, steps))


def drawn(folders: list[Path]) -> list[Line]:
    runs = read_runs(folders)
    return lines_of(runs, rows(runs))


def test_lines_are_medians_behind_which_every_step_is_faint(tmp_path: Path) -> None:
    told = drawn([noisy(tmp_path, "rewarm"), noisy(tmp_path, "rewarm_half")])
    figure = draw_training(told)
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Training loss", "Gradient norm", "Throughput (tokens/s)"]
    for axes, column in zip(figure.axes, ("loss", "grad_norm", "tokens_per_second"), strict=True):
        raw, smooth = axes.lines[:2]
        assert raw.get_alpha() == 0.22 and smooth.get_alpha() is None and raw.get_color() == smooth.get_color()
        assert np.array_equal(raw.get_ydata(), told[0].run.train[column])
        stretches = told[0].run.train[column].reshape(40, 10)
        assert np.array_equal(smooth.get_ydata(), np.median(stretches, axis=1))
        assert axes.get_ylim()[1] < 1.5 * np.sort(stretches, axis=None)[-5]
    assert figure.axes[1].get_ylim()[1] < 5 and figure.axes[2].get_ylim()[0] > 1e5  # the one step far out empties no picture
    assert_legible(figure)
    assert "rewarm: training loss" in describe_training(told) and "throughput (tokens/s) 120k" in describe_training(told)


def test_what_a_run_lacks_has_no_panel(tmp_path: Path) -> None:
    bare = [{key: value for key, value in event.items() if key != "tokens_per_second"} for event in lines("rewarm", 40)]
    figure = draw_training(drawn([write(tmp_path / "bare", bare, config("rewarm", 40))]))
    assert figure is not None and len(figure.axes) == 2 and not figure.legends
    assert draw_training(drawn([write(tmp_path / "one", [train_line(1, 1e-3, 3.0)])])) is None
    lost = [
        event | {"loss": None} if event["event"] == "train" and event["step"] > 20 else event for event in lines("rewarm", 40)
    ]
    run = read_run(write(tmp_path / "lost", lost, config("rewarm", 40)))
    tokens, losses = medians(run, "loss")
    assert np.array_equal(tokens, run.train["tokens"][:20]) and np.array_equal(losses, run.train["loss"][:20])


def test_date_machine_and_versions_are_on_the_page(tmp_path: Path) -> None:
    start: dict[str, Any] = {"ranks": 8, "device": "cuda:0", "layout": "pipeline 1 x data 8 x tensor 1", "precision": "bf16",
             "kernels": {"attention": "flash", "compile": True, "deterministic": False, "optimizer": "torch"},
             "versions": {"megarewarm": "0.1.0", "torch": "2.13.0"}}  # fmt: skip
    folders = [noisy(tmp_path, "rewarm", **start), noisy(tmp_path, "prose_pretrain")]
    page = report(folders, tmp_path / "out")
    text = "".join(check(page).text)
    assert "2026-11-28 10:00" in text
    for said in (
        "13m20s",
        "120k",
        "8 x cuda, pipeline 1 x data 8 x tensor 1",
        "bf16",
        "attention flash, compile, optimizer torch",
    ):
        assert said in text, said
    assert "megarewarm 0.1.0, torch 2.13.0" in text and "deterministic" not in text
    assert {"training.png", "pretraining_steps.png"} <= {path.name for path in page.parent.iterdir()}
    row = json.loads((page.parent / "table.json").read_text())[0]
    assert row["wall_time"] == 800 and row["tokens_per_second"] == pytest.approx(1.2e5, rel=0.01)
    plain = report([write(tmp_path / "plain", lines("rewarm", 20))], tmp_path / "old")
    text = "".join(check(plain).text)
    assert "Tokens/s" in text and not re.search("Wall time<|Versions|Date", text)


@pytest.mark.parametrize("time", ["yesterday", 1e308, -1.0, math.nan, None, True, [1]])
def test_a_start_that_makes_no_sense_is_a_dash(tmp_path: Path, time: Any) -> None:
    start = {
        "time": time,
        "ranks": "many",
        "device": ["<b>"],
        "precision": 32,
        "kernels": {"a": {"b": 1}, "<i>": "<u>"},
        "versions": [1],
    }
    events = [event | start if event["event"] == "start" else event for event in lines("rewarm", 20)]
    text = report([write(tmp_path / "run", events)], tmp_path / "out").read_text()
    assert "&lt;i&gt; &lt;u&gt;" in text and "<u>" not in text and "Date (UTC)" not in text


def test_wall_time_leaves_pauses_out(tmp_path: Path) -> None:
    def timed(*events: tuple[str, int, float]) -> RecordedRun:
        told = [{"event": "start", "time": 1000.0, "name": "a"}, train_line(1, 1e-3, 3.0)]
        told += [{"event": kind, "step": step, "time": time} for kind, step, time in events]
        return read_run(write(tmp_path / "run", told))

    assert wall_time(timed(("stop", 1, 1100.0))) == 100
    assert wall_time(timed(("stop", 1, 1100.0), ("resume", 1, 5000.0), ("stop", 1, 5030.0))) == 130
    assert wall_time(timed(("save", 1, 1060.0), ("resume", 1, 5000.0), ("save", 1, 5030.0))) == 90  # killed after a save
    assert wall_time(timed(("stop", 1, 900.0))) == 0  # a clock that was set back
    assert wall_time(timed()) == 0
    assert wall_time(read_run(write(tmp_path / "old", lines("rewarm", 5)))) is None
