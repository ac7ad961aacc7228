"""The heat map of a sweep over two axes, the colours that mean an axis, and the parts of a large sweep."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from megarewarm.report.figures import style
from megarewarm.report.figures.heatmap import caption_grid, describe_grid, draw_grid, grid_of
from megarewarm.report.figures.panels import lines_of_arms, panels_of
from megarewarm.report.figures.sweeps import axis_lines, draw_axis
from megarewarm.report.numbers.arms import arm_rows, comparisons
from megarewarm.report.numbers.experiment import ExperimentRecord, read_experiment
from megarewarm.report.pages.experiment_page import report_experiment
from megarewarm.report.pages.findings import summarise_experiment
from tests.report.test_page import assert_legible
from tests.support.experiment_runs import STEPS, entry, write_record, write_run

PEAKS, SHARES = (5e-4, 1e-3, 2e-3, 4e-3), (None, 0.01, 0.05, 0.25)


def ends(peak: float, share: float | None, seed: int | None = None) -> tuple[float, float]:
    """Final losses; the lowest average is at 1e-3 with 0.05, the lowest upstream loss at 5e-4 with 0.25."""
    x, y = np.log2(peak / 1e-3), share or 0.0
    noise = 0.004 * (seed or 0)
    return 2.5 + 0.1 * x - 0.4 * y**0.5 + noise, 2.4 + 0.15 * x**2 - 0.14 * x + 0.9 * y + noise


def sweep(
    folder: Path,
    peaks: Sequence[float] = PEAKS,
    shares: Sequence[Any] = SHARES,
    seeds: Sequence[int | None] = (None,),
    **keys: Any,
) -> ExperimentRecord:
    """A sweep 'grid' over peak and replay, and a single arm 'other' from the same start."""
    entries = []
    for seed, peak, share in itertools.product(seeds, peaks, shares):
        axes = {"schedule.max_lr": peak, "replay.fraction": share}
        plan = entry(f"grid_{peak:g}_{share}", seed, after=["start"], group="grid", axes=axes)
        up, down = ends(peak, share, seed)
        entries.append(plan)
        write_run(folder, plan, [2.2, up + 0.2, up], [3.0, down + 0.1, down], peak=peak, **keys)
    for seed in seeds:
        entries.append(entry("other", seed, after=["start"]))
        write_run(folder, entries[-1], [2.2, 2.6], [3.0, 2.6])
    return read_experiment(write_record(folder, entries))


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> ExperimentRecord:
    return sweep(tmp_path_factory.mktemp("sweep") / "runs")


def cells(axes: Axes) -> dict[tuple[float, float], str]:
    return {(x, y): text.get_text() for text in axes.texts for x, y in [text.get_position()]}


def framed(axes: Axes) -> list[tuple[float, float]]:
    return [(p.get_x(), p.get_y()) for p in axes.patches if isinstance(p, Rectangle) and not p.get_fill()]


def test_every_cell_is_the_arm_of_its_values_and_the_lowest_is_framed(grid: ExperimentRecord) -> None:
    found = grid_of(arm_rows(grid), "grid")
    assert found is not None and found.axes == ("schedule.max_lr", "replay.fraction")
    assert found.columns == ["5e-4", "1e-3", "2e-3", "4e-3"] and found.rows == ["0", "0.01", "0.05", "0.25"]
    figure = draw_grid(found)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Average of both losses", "Upstream loss", "Downstream loss"]
    for axes, number in zip(figure.axes, (None, 0, 1), strict=True):
        truth = {(c + 0.5, r + 0.5): np.mean(ends(peak, share)) if number is None else ends(peak, share)[number]
                 for (c, peak), (r, share) in itertools.product(enumerate(PEAKS), enumerate(SHARES))}  # fmt: skip
        assert cells(axes) == {place: f"{loss:.3f}" for place, loss in truth.items()}
        x, y = min(truth, key=lambda place: truth[place])
        assert framed(axes) == [(x - 0.5, y - 0.5)]
        # darker is lower
        mesh: Any = axes.collections[0]
        mesh.update_scalarmappable()
        lightness = matplotlib.colors.rgb_to_hsv(mesh.get_facecolors()[:, :3])[:, 2]
        losses = np.array([truth[c + 0.5, r + 0.5] for r in range(4) for c in range(4)])
        assert np.all(np.diff(lightness[np.argsort(losses)]) >= -1e-9)
    assert_legible(figure)
    assert "Average of both losses: lowest" in describe_grid(found) and "one seed each" in caption_grid(found)


def test_it_is_the_first_picture_of_the_page(grid: ExperimentRecord, tmp_path: Path) -> None:
    page = report_experiment(grid.folder, tmp_path).read_text()
    pictures = re.findall(r'<img alt="([^"]*)"', page)
    assert pictures[0].startswith("Heat maps over schedule.max_lr and replay.fraction.")
    assert re.findall("<h2>([^<]*)</h2>", page)[:4] == [
        "Final losses over two settings", "Final losses along the sweeps", "Forgetting against adaptation",
        "Losses and learning rates",
    ]  # fmt: skip
    assert {"grid_grid.png", "grid_grid.svg"} <= {path.name for path in tmp_path.iterdir()}
    headings = re.findall("<h3>(grid [^<]*: [^<]*)</h3>", page)
    assert headings[:2] == [
        "grid (schedule.max_lr, replay.fraction): replay.fraction 0 and 0.01",
        "grid (schedule.max_lr, replay.fraction): replay.fraction 0.05 and 0.25",
    ]


def test_seeds_holes_and_diverged_arms(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    experiment = sweep(folder, PEAKS, (0.01, 0.25), seeds=(1, 2))
    lost = next(trial for trial in experiment.trials if trial.name == "grid_0.004_0.25.s1")
    assert lost.run is not None
    text = (lost.run.folder / "metrics.jsonl").read_text().splitlines()
    text = [re.sub(r'"loss": [\d.]+', '"loss": null', t) if f'"eval", "step": {STEPS}' in t else t for t in text]
    (lost.run.folder / "metrics.jsonl").write_text("\n".join(text) + "\n")
    for seed in (1, 2):  # an arm that has not begun
        (folder / f"seed_{seed}/grid_0.0005_0.01/metrics.jsonl").unlink()
    found = grid_of(arm_rows(read_experiment(folder)), "grid")
    assert found is not None and found.cells[0][0] is None
    figure = draw_grid(found)
    written = cells(figure.axes[1])
    assert written[0.5, 0.5] == "–" and written[3.5, 1.5].endswith("\n1 diverged")
    assert re.fullmatch(r"\d\.\d{3}\n± 0\.003", written[1.5, 0.5])
    assert_legible(figure)
    assert "± their standard deviation" in caption_grid(found)


def test_what_does_not_compare_is_no_grid(tmp_path: Path) -> None:
    assert grid_of(arm_rows(sweep(tmp_path / "line", PEAKS, (0.05,))), "grid") is None
    assert grid_of(arm_rows(sweep(tmp_path / "few", PEAKS[:1], SHARES)), "grid") is None
    experiment = sweep(tmp_path / "sets", PEAKS[:2], SHARES[:2])
    plan = entry("grid_more", None, after=["start"], group="grid", axes={"schedule.max_lr": 1.0, "replay.fraction": 1.0})
    write_run(experiment.folder, plan, [2.2, 2.5], [3.0, 2.5], sets=("prose", "news"))
    entries = [
        entry(t.name, None, after=["start"], group="grid", axes=a.groups["grid"])
        for a in experiment.arms[:-1]
        for t in a.trials
    ]
    assert grid_of(arm_rows(read_experiment(write_record(experiment.folder, [*entries, plan]))), "grid") is None
    assert grid_of(arm_rows(read_experiment(write_record(experiment.folder, entries))), "grid") is not None


@pytest.mark.parametrize("count", [3, 7, 9, 16])
def test_wide_grids_are_legible(tmp_path: Path, count: int) -> None:
    peaks = [float(f"{1e-4 * 1.5**n:.3g}") for n in range(count)]
    found = grid_of(arm_rows(sweep(tmp_path / "runs", peaks, (None, 0.01, 0.05))), "grid")
    assert found is not None
    with style.style():
        assert_legible(draw_grid(found))


def test_colours_are_the_values_of_an_axis(grid: ExperimentRecord) -> None:
    """One colour for each peak, the same in every part; replay fractions by dashes. Lines against the peak: by replay."""
    parts = panels_of(grid)
    assert [panel.key for panel in parts] == ["single", "grid_part1", "grid_part2"] or len(parts) == 2
    colours: dict[float, set[str]] = {}
    for panel in parts[-2:]:
        lines = lines_of_arms(panel.arms)
        inside = [(arm, line) for arm, line in zip(panel.arms, lines, strict=True) if "grid" in arm.groups]
        assert len(inside) == 8
        for arm, line in inside:
            colours.setdefault(arm.groups["grid"]["schedule.max_lr"], set()).add(line.colour)
        by_share = {arm.groups["grid"]["replay.fraction"]: str(line.dashes) for arm, line in inside}
        assert len(set(by_share.values())) == 2
    assert [next(iter(colours[peak])) for peak in PEAKS] == style.sequence(4) and set(map(len, colours.values())) == {1}
    told = axis_lines(arm_rows(grid), "grid")
    assert told is not None and [line.colour for line in told[1]] == style.sequence(4, axis=1)
    assert [line.label for line in told[1]] == [f"replay.fraction {share or 0}" for share in SHARES]
    assert_legible(draw_axis(*told))


def test_a_long_axis_is_divided_in_order_and_says_how(tmp_path: Path) -> None:
    peaks = [float(f"{1e-4 * 1.5**n:.3g}") for n in range(12)]
    panels = [panel for panel in panels_of(sweep(tmp_path / "runs", peaks, (None,))) if panel.key.startswith("grid")]
    assert [len(panel.arms) for panel in panels] == [9, 3]
    assert [panel.title.rpartition(": ")[2] for panel in panels] == [
        f"part 1 of 2, {panels[0].arms[0].name} to {panels[0].arms[-1].name}",
        f"part 2 of 2, {panels[1].arms[0].name} to {panels[1].arms[-1].name}",
    ]


def test_bullets_have_at_most_five_numbers(grid: ExperimentRecord, tmp_path: Path) -> None:
    for experiment in (grid, sweep(tmp_path / "seeds", seeds=(1, 2, 3))):
        rows = arm_rows(experiment)
        bullets = summarise_experiment(experiment, rows, comparisons(experiment, rows))
        for bullet in bullets:
            for name in sorted((arm.name for arm in experiment.arms), key=len, reverse=True):
                bullet = bullet.replace(name, "ARM")
            assert len(re.findall(r"(?<![\w.])[+−]?\d[\d.e-]*", bullet)) <= 5, bullet
        best = "schedule.max_lr 1e-3 with replay.fraction 0.05 has the lowest average of both losses"
        assert sum(best in bullet for bullet in bullets) == 1


def test_a_tie_is_no_lowest(tmp_path: Path) -> None:
    entries = []
    for number, (peak, share) in enumerate(itertools.product(PEAKS[:2], SHARES[1:3])):
        plan = entry(
            f"arm_{number}", None, after=["start"], group="grid", axes={"schedule.max_lr": peak, "replay.fraction": share}
        )
        entries.append(plan)
        write_run(tmp_path, plan, [2.2, 2.5 + 0.001 * number], [3.0, 2.5])
    experiment = read_experiment(write_record(tmp_path, entries))
    rows = arm_rows(experiment)
    text = "\n".join(summarise_experiment(experiment, rows, comparisons(experiment, rows)))
    assert "the lowest average of both losses is 2.500, equal within 0.005 in arm_0, arm_1, arm_2 and arm_3" in text
    assert "has the lowest" not in text and "most in" not in text
