"""tools/advise.py on whole experiments: what it reads, what it recommends, and what it refuses to."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text
from rich.console import Console

from megarewarm.errors import UserError
from megarewarm.laws import annealing, replay
from megarewarm.laws.advice import advise, as_json
from megarewarm.laws.arms import read_trained, replay_families, schedule_families
from megarewarm.laws.show import advice_figure
from megarewarm.laws.tell import print_advice
from megarewarm.report.figures import style
from tests.laws import test_fits as made
from tests.support import advice_worlds as worlds
from tests.support.report_runs import write

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 2048


def add_run(
    root: Path,
    name: str,
    rates: np.ndarray,
    losses: dict[str, tuple[np.ndarray, np.ndarray]],
    origin: str | None,
    config: dict[str, Any],
    *,
    complete: bool = True,
) -> dict[str, Any]:
    """A run's folder with these losses after these steps; its entry in experiment.json."""
    place = f"seed_1/{name}"
    spec = {"curve": "cosine", "max_lr": float(rates.max()), "warmup_steps": 2.0, "length": float(len(rates))}
    spec["min_lr"] = float(rates.max()) / 10
    events: list[dict[str, Any]] = [{"event": "start", "name": name, "from": origin, "step": 0, "schedule": spec}]
    for step in range(len(rates) + 1):
        if step:
            numbers = {"loss": 3.0, "lr": float(rates[step - 1]), "grad_norm": 1.0, "tokens_per_second": 1e4}
            events.append({"event": "train", "step": step, "tokens": step * TOKENS, **numbers})
        for role, (steps, values) in losses.items():
            if len(found := values[steps == step]):
                told = {"name": f"{role}_set", "role": role, "loss": float(found[0])}
                events.append({"event": "eval", "step": step, "tokens": step * TOKENS, **told})
    if complete:
        events.append({"event": "stop", "step": len(rates), "reason": "complete"})
    config = {"name": name, "folder": str(root / place), "start": {"from": origin}, **config}
    write(root / place, events, config)
    return {"name": name, "arm": name, "seed": 1, "folder": place, "after": [], "steps": len(rates)}


def schedules(root: Path, arms: dict[str, np.ndarray], roles: tuple[str, ...] = ("upstream", "downstream")) -> Path:
    """An experiment whose runs differ in the schedule, after a run from scratch that they start from."""
    before = np.concatenate([np.full(299, made.SUM_BEFORE / 299 - made.BEFORE / 299), [made.BEFORE]])
    first = {"upstream": (np.array([0, 300]), np.array([9.0, 3.0]))}
    entries = [add_run(root, "base", before, first, None, {"schedule": {}})]
    for arm, rates in arms.items():
        losses = {}
        for role, shift in (("upstream", 0.9), ("downstream", -0.9)):
            if role in roles:
                losses[role] = made.trained(arm, rates, shift, 0.002).losses["upstream"]
        config = {"schedule": {"max_lr": float(rates.max())}}
        entries.append(add_run(root, arm, rates, losses, f"{root}/seed_1/base/checkpoints/step_300", config))
    record = {"format": 1, "experiment": root.name, "title": None, "runs": entries}
    (root / "experiment.json").write_text(json.dumps(record))
    return root


def replays(root: Path, fractions: list[float]) -> Path:
    entries = []
    for fraction in fractions:
        losses = {role: made.replayed(fraction, role, 0.001).losses[role] for role in ("upstream", "downstream")}
        config = {"schedule": {"max_lr": 1e-3}, "replay": {"fraction": fraction, "of": "lineage"} if fraction else None}
        entries.append(add_run(root, f"r{fraction}", np.full(made.STEPS, 1e-3), losses, "elsewhere/step_9", config))
    (root / "experiment.json").write_text(json.dumps({"format": 1, "experiment": root.name, "runs": entries}))
    return root


def test_what_is_read(tmp_path: Path) -> None:
    root = schedules(tmp_path / "trial", made.ARMS)
    record = json.loads((root / "experiment.json").read_text())
    losses = made.trained("low", made.ARMS["low"], 0.9, 0.0).losses
    other = {"schedule": {"max_lr": 5e-4}, "optimizer": {"kind": "other"}}
    record["runs"].append(add_run(root, "other", made.ARMS["low"], losses, f"{root}/seed_1/base", other))
    record["runs"].append(add_run(root, "half", made.ARMS["low"], losses, f"{root}/seed_1/base", {}, complete=False))
    record["runs"].append({"name": "later", "arm": "later", "seed": 1, "folder": "seed_1/later"})
    (root / "experiment.json").write_text(json.dumps(record))
    title, runs, notes = read_trained(root)
    assert title == "trial" and [run.name for run in runs] == [*made.ARMS, "other"]
    assert notes[1] == "2 of 9 runs left out, not finished: half, later" and "trained from scratch" in notes[0]
    assert runs[0].rate_before == pytest.approx(made.BEFORE) and runs[0].sum_before == pytest.approx(made.SUM_BEFORE)
    (family,) = schedule_families(runs)
    assert family.arms == list(made.ARMS) and replay_families(runs) == []
    assert family.mean_start("upstream") == pytest.approx(3.01)


@pytest.fixture(autouse=True)
def one_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """One lambda is tried instead of five, which is all that a test has time for."""
    monkeypatch.setattr(annealing, "MEMORIES", (0.95,))
    monkeypatch.setattr(replay, "_STARTS", replay._STARTS[:2])


PEAKS = (5e-4, 1e-3, 2e-3, 4e-3)


def test_the_answer_comes_first(tmp_path: Path) -> None:
    root = worlds.experiment(tmp_path / "trial", worlds.grid(PEAKS), worlds.annealing)
    command = [sys.executable, str(ROOT / "tools" / "advise.py"), str(root), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "trial" and lines[1].startswith("Best of 4 arms: cosine_") and len(lines) < 30
    assert "highest peak of the tested range, and the laws predict nothing beyond it: try schedule.max_lr 8e-3." in done.stdout
    assert "held out, then predicted" not in done.stdout and "--all shows the laws" in done.stdout
    assert (tmp_path / "out" / "advice.png").stat().st_size > 10_000
    told = json.loads((tmp_path / "out" / "advice.json").read_text())
    (answer,) = told["answers"]
    means = {arm: sum(losses.values()) for arm, losses in answer["arms"].items()}
    assert answer["best"] == min(means, key=lambda arm: means[arm]) and answer["aim"] == "mean of both losses"
    assert answer["upstream_limit"] == pytest.approx(4.0 * 1.02)
    (section,) = told["sections"]
    assert section["kind"] == "schedule" and "only one replay fraction (0)" in " ".join(told["notes"])
    run = {round(one["keys"]["schedule"]["max_lr"], 6) for one in section["predictions"] if one["arm"] is None}
    assert run <= {0.000707, 0.001414, 0.002828} and run
    out = io.StringIO()
    print_advice(advise(root), Console(file=out, width=100), details=True)
    assert "held out, then predicted" in out.getvalue() and "* outside the range of the remaining arms" in out.getvalue()


@pytest.mark.parametrize("before", ["", "rewarmed_from_the_middle_of_", "its_own_"])
def test_names_stay_inside_their_frames_and_off_each_other(tmp_path: Path, before: str) -> None:
    advice = advise(worlds.experiment(tmp_path / "trial", worlds.grid(PEAKS), worlds.annealing))
    for law in advice.sections[0].laws.values():
        law.trial.arms[:] = [
            dataclasses.replace(
                arm, inside=True, arm=f"{before}{arm.arm}_with_{number}_warm_ups_{arm.arm}" if before else arm.arm
            )
            for number, arm in enumerate(law.trial.arms)
        ]
    figure = advice_figure(advice)
    assert figure is not None
    figure.canvas.draw()
    for axes in figure.axes[-2:]:
        boxes = {text.get_text(): Text.get_window_extent(text) for text in axes.texts}
        assert len(boxes) == len(PEAKS)
        frame = axes.get_window_extent()
        for told, box in boxes.items():
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1, told
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes.values(), 2))


def test_the_picture_says_which_replay_and_its_lines_pass_the_crosses(tmp_path: Path) -> None:
    arms = worlds.grid((1e-3, 2e-3), replays=(0.0, 0.02, 0.05, 0.1, 0.25, 0.5))
    advice = advise(worlds.experiment(tmp_path / "trial", arms, worlds.annealing))
    figure = advice_figure(advice)
    assert figure is not None and len(figure.axes) == 6
    peaks, shares = figure.axes[0], figure.axes[2]
    legend = peaks.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()][:2] == ["replay 0%", "replay 2%"]
    crosses = [line for line in shares.lines if line.get_marker() == "x"]
    curves = [line for line in shares.lines if line.get_marker() == "None"]
    assert len(crosses) == len(curves) == 2
    band = max(trial.band for section in advice.sections for trial in section.trials.values() if section.laws)
    for cross, curve in zip(crosses, curves, strict=True):
        x, y = (np.asarray(data, dtype=float) for data in cross.get_data())
        across, along = (np.asarray(data, dtype=float) for data in curve.get_data())
        assert np.abs(np.interp(x, across, along) - y).max() <= band


def test_a_grid_of_peaks_and_replay_is_one_table(tmp_path: Path) -> None:
    arms = worlds.grid((1e-3, 2e-3), replays=(0.0, 0.1, 0.5))
    out = io.StringIO()
    print_advice(advise(worlds.experiment(tmp_path / "trial", arms, worlds.odd)), Console(file=out, width=80))
    rows = [line.split() for line in out.getvalue().splitlines()]
    for fraction in (0.0, 0.1, 0.5):
        (row,) = [row for row in rows if row[:1] == [f"{100 * fraction:g}%"]]
        assert row[1:] == [
            f"{worlds.end(worlds.odd, worlds.ArmSpec(p, replay=fraction))['upstream']:.3f}" for p in (1e-3, 2e-3)
        ]


def test_advice_on_replay(tmp_path: Path) -> None:
    advice = advise(replays(tmp_path / "trial", [0.0, 0.01, 0.05, 0.1, 0.25, 0.5]), 0.12)
    (section,) = advice.sections
    limit = 2.6 * 1.12
    fractions = np.linspace(0, 0.5, 5001)
    truth = 1 - float(fractions[made.true_loss(1.0, fractions) <= limit].min())
    (sentence,) = [text for text in section.sentences if text.startswith("Largest share of new data")]
    told = float(sentence.split("): ")[1].split("%")[0]) / 100
    assert told == pytest.approx(truth, abs=0.03)
    assert "Its downstream cost relative to replay 0%" in sentence
    (refused,) = [
        text for text in advise(tmp_path / "trial", 0.0).sections[0].sentences if text.startswith("No fraction up to")
    ]
    assert "at 0.5 it is predicted at" in refused
    json.dumps(as_json(advice), allow_nan=False)


def test_pictures_of_several_groups_name_theirs_and_the_fits_are_told(tmp_path: Path) -> None:
    arms = [*worlds.grid(PEAKS), *worlds.grid(PEAKS, start="another_run/step_5")]
    told: list[str] = []
    advice = advise(worlds.experiment(tmp_path / "trial", arms, worlds.annealing), progress=told.append)
    assert told == [f"fitting the schedule law to the {role} loss of 4 arms" for _ in range(2) for role in worlds.ROLES]
    figure = advice_figure(advice)
    assert figure is not None
    titles = [axes.get_title(loc="left").split("\n")[1] for axes in figure.axes]
    assert {title.partition(" (")[0] for title in titles} == {
        f"4 arms from {start}, 80 steps" for start in ("elsewhere/step_9", "another_run/step_5")
    }
    figure.canvas.draw()
    for axes in figure.axes:
        assert axes._left_title.get_window_extent().x1 <= axes.get_window_extent().x1 + 20  # type: ignore[attr-defined]


def test_lines_of_a_panel_are_a_sequence_and_the_best_cell_stands_out(tmp_path: Path) -> None:
    arms = worlds.grid((1e-3, 2e-3), replays=(0.0, 0.1, 0.5))
    advice = advise(worlds.experiment(tmp_path / "trial", arms, worlds.odd))
    figure = advice_figure(advice)
    if figure is not None:
        crosses = [line.get_color() for line in figure.axes[0].lines if line.get_marker() == "x"]
        assert crosses == style.sequence(3, axis=1)
    out = io.StringIO()
    print_advice(advice, Console(file=out, width=80, force_terminal=True, color_system="standard"))
    (marked,) = set(re.findall(r"\x1b\[1;7m *(\d\.\d{3})", out.getvalue().partition("replay")[2])[:1])
    best = advice.answers[0].measured[advice.answers[0].best]
    assert marked == f"{best['upstream']:.3f}"


def test_a_tie_is_named(tmp_path: Path) -> None:
    def flat(arm: worlds.ArmSpec, role: str) -> np.ndarray:
        return worlds.annealing(dataclasses.replace(arm, peak=1e-3), role)

    root = worlds.experiment(tmp_path / "trial", worlds.grid(PEAKS), flat)
    sentences = " ".join(advise(root).answers[0].sentences)
    assert "the seed noise is unknown; within 0.005 of the best: " in sentences


def test_too_little_is_said_plainly(tmp_path: Path) -> None:
    few = advise(worlds.experiment(tmp_path / "few", worlds.grid(PEAKS[:3]), worlds.annealing))
    told = " ".join(few.answers[0].sentences)
    assert not few.sections[0].laws and few.answers[0].next is None
    assert "The data are insufficient to predict schedules (too few: 3 schedules: at least 4 are needed)" in told
    assert "What would help most: runs with schedule.max_lr 7.07e-4, all else as in" in told
    fractions = advise(replays(tmp_path / "fractions", [0.0, 0.05, 0.5])).answers[0].sentences
    assert "3 replay fractions (0, 0.05, 0.5): at least 5 are needed" in " ".join(fractions)
    assert "replay.fraction 0.28" in " ".join(fractions)
    one = advise(schedules(tmp_path / "one", {"low": made.ARMS["low"]}))
    assert one.sections == [] and any("no two finished runs differ only in the schedule" in note for note in one.notes)
    assert one.answers[0].sentences[0].startswith("One arm, and nothing to compare it with: low")
    lone = advise(schedules(tmp_path / "lone", made.ARMS, roles=("upstream",)))
    assert "These runs share no downstream validation set: that loss is not predicted." in lone.sections[0].sentences
    assert "the lowest upstream loss" in lone.answers[0].sentences[0]


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no experiment\.json: give the folder of an experiment"):
        advise(tmp_path)
    (tmp_path / "experiment.json").write_text("{")
    with pytest.raises(UserError, match=r"experiment\.json: damaged"):
        advise(tmp_path)
    (tmp_path / "experiment.json").write_text('{"experiment": "e", "runs": []}')
    with pytest.raises(UserError, match="no finished run that started from a checkpoint"):
        advise(tmp_path)
    with pytest.raises(UserError, match=r"--upstream-within -1: give a share such as 2%"):
        advise(tmp_path, -1.0)
