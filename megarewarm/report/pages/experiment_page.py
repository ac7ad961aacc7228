"""The report of an experiment: one self-contained HTML page, figures as PNG and SVG, tables as CSV and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megarewarm.report.figures import curves as draw
from megarewarm.report.figures import style
from megarewarm.report.figures.heatmap import caption_grid, describe_grid, draw_grid, grid_of
from megarewarm.report.figures.lines import Line
from megarewarm.report.figures.panels import (
    caption_arms,
    chains_of,
    draw_dynamics,
    draw_interpolation,
    lines_of_arms,
    panels_of,
)
from megarewarm.report.figures.pareto import comparable, describe_pareto, draw_pareto
from megarewarm.report.figures.sweeps import axis_lines, caption_axis, describe_axis, draw_axis
from megarewarm.report.numbers.arms import ArmRow, Comparison, arm_rows, comparisons
from megarewarm.report.numbers.experiment import ArmRecord, ExperimentRecord, read_experiment
from megarewarm.report.numbers.measure import Measure, run_measures
from megarewarm.report.numbers.runs import differences, row_of
from megarewarm.report.pages import html
from megarewarm.report.pages import tables as arm_table
from megarewarm.report.pages.files import write_csv, write_json
from megarewarm.report.pages.findings import summarise_experiment
from megarewarm.report.pages.html import (
    Picture,
    breakable,
    page_html,
    picture_html,
    save_picture,
    setting_text,
    svg_of,
    value_cells,
)
from megarewarm.report.pages.tables import SCRIPT, arms_html, comparisons_html
from megarewarm.spelling import tokens_text

_BAND = " Lines are means over the complete seeds, bands reach from the lowest to the highest seed."
_BARS = "Means over the seeds; bars reach from the lowest to the highest seed."
_SEED_KEYS = ("training.seed", "data.seed")


def report_experiment(folder: Path | str, output_folder: Path | str) -> Path:
    """Write the report of the experiment in ``folder`` into ``output_folder`` and return the path of its report.html.

    Beside it: every figure as NAME.png and NAME.svg, and arms, runs and comparisons as CSV and JSON. Removes the figures of an
    earlier report there. Raises UserError if the experiment can't be read.
    """
    experiment = read_experiment(folder)
    rows = arm_rows(experiment)
    compared = comparisons(experiment, rows)
    output = Path(output_folder)
    output.mkdir(parents=True, exist_ok=True)
    _remove_old(output)
    told: dict[str, list[str]] = {}
    names = []
    for part, picture in _pictures(experiment, rows):
        svg = svg_of(picture.figure)
        save_picture(picture, svg, output)
        names.append(picture.name)
        told.setdefault(part, []).append(picture_html(picture, svg))
        picture.figure.clear()  # frees memory: there may be dozens
    (output / ".pictures").write_text("\n".join(names), encoding="utf-8")
    tables = {"arms": [row.flat() for row in rows], "runs": _flat_runs(experiment, rows[0].measures)}
    tables["comparisons"] = [comparison.flat() for comparison in compared]
    for name, table in tables.items():
        write_json(output / f"{name}.json", table)
        write_csv(output / f"{name}.csv", table)
    page = output / "report.html"
    page.write_text(_page(experiment, rows, compared, told), encoding="utf-8")
    return page


def _remove_old(output: Path) -> None:
    """Remove the pictures of an earlier report, because they could be taken for this one's."""
    listing = output / ".pictures"
    names = listing.read_text(encoding="utf-8").split("\n") if listing.is_file() else []
    for name in names:
        for ending in ("png", "svg"):
            if name and "/" not in name:
                (output / f"{name}.{ending}").unlink(missing_ok=True)


def _pictures(experiment: ExperimentRecord, rows: Sequence[ArmRow]) -> list[tuple[str, Picture]]:
    """The figures, each with its part of the page."""
    main = experiment.main.name if experiment.main else None
    panels = panels_of(experiment)
    found: list[tuple[str, Picture]] = []

    def add(part: str, name: str, title: str, figure: Figure | None, description: str, caption: str) -> None:
        if figure is not None:
            found.append((part, Picture(name, title, figure, description, caption)))

    for panel in panels:
        lines = lines_of_arms(panel.arms)
        black = len(lines) > 1 and lines[0].colour == style.colour(style.BLACK)
        shared = f" Black: {lines[0].label}, for comparison." if black else ""
        caption = draw.caption_lines(lines) + _bands(lines) + caption_arms(panel.arms) + shared
        add("losses", f"losses_{panel.key}", panel.title, draw.curves_figure(lines), _named(lines), caption)
    for sweep in experiment.groups:
        if grid := grid_of(rows, sweep):
            title = f"{sweep}: {' and '.join(grid.axes)}"
            add("grids", f"grid_{sweep}", title, draw_grid(grid), describe_grid(grid), caption_grid(grid))
    for number, group in enumerate(comparable(rows), start=1):
        sets = " and ".join(group[0].arm.sets[0] + group[0].arm.sets[1])
        length = tokens_text(group[0].mean("tokens") or 0.0)
        title = f"Runs of {length} tokens from {group[0].arm.start}, on {sets}"
        bars = _BARS if any(row.seeds[0] > 1 for row in group) else "One seed each."
        caption = f"{bars} Up and left is better. Dashes: the front; no arm has better means in both."
        add("pareto", f"pareto_{number}", title, draw_pareto(group, main), describe_pareto(group), caption)
    for sweep in experiment.groups:
        if told := axis_lines(rows, sweep):
            title = f"{sweep}: final losses against {told[0]}"
            add("axes", f"axis_{sweep}", title, draw_axis(*told), describe_axis(*told), caption_axis(told[1]))
    if chains := chains_of(experiment):
        caption = "Dotted lines: where the next stage begins. " + draw.caption_lines(chains.lines, chains.stages)
        figure = draw.curves_figure(chains.lines, chains.stages, "tokens of all stages")
        add("chains", "chains", "Losses over all stages", figure, _named(chains.lines), caption + _bands(chains.lines))
    for panel in panels:
        text = "Line charts: loss between the start weights and the final weights."
        caption = "The loss of (1 - alpha) x start + alpha x end."
        add("interpolation", f"interpolation_{panel.key}", panel.title, draw_interpolation(panel.arms), text, caption)
    for panel in panels:
        text = "Line charts of update ratio, distance from the start, and gradient norm against tokens."
        add("dynamics", f"dynamics_{panel.key}", panel.title, draw_dynamics(panel.arms), text, "")
    return found


def _bands(lines: Sequence[Line]) -> str:
    return _BAND if any(len(line.seeds) > 1 for line in lines) else " One seed each, so there is no band."


def _named(lines: Sequence[Line]) -> str:
    return draw.describe_named([(line.label, line.run) for line in lines])


def _page(
    experiment: ExperimentRecord, rows: Sequence[ArmRow], compared: Sequence[Comparison], told: dict[str, list[str]]
) -> str:
    sentences = "".join(f"<li>{escape(text)}</li>" for text in summarise_experiment(experiment, rows, compared))
    main = experiment.main.name if experiment.main else None
    parts = [
        f"<h1>{escape(experiment.title)}</h1>",
        f'<p class="quiet">Experiment {escape(experiment.name)}</p>',
        f'<ul class="summary">{sentences}</ul>',
        _part("Final losses over two settings", told.get("grids")),
        _part("Final losses along the sweeps", told.get("axes")),
        _part("Forgetting against adaptation", told.get("pareto")),
        _part("Losses and learning rates", told.get("losses")),
        _part("Chains of stages", told.get("chains")),
        _part("Interpolation between start and final weights", told.get("interpolation")),
        _folded("Dynamics: update ratio, distance, gradient norm", told.get("dynamics")),
        "<h2>In numbers</h2>" + arms_html(rows, main) if any(row.seeds[0] for row in rows) else "",
        "<h2>Differences between arms</h2>" + comparisons_html(compared) if compared else "",
        _settings(experiment.arms),
        _states(experiment),
        '<footer class="quiet">Beside this page: every figure as PNG and SVG, and arms, runs and comparisons as CSV and JSON. '
        f"Losses are mean cross entropies in {experiment.unit} on fixed validation tokens.</footer>",
    ]
    css = html.STYLE + arm_table.STYLE
    return page_html(experiment.title, css, parts, SCRIPT)


def _part(title: str, sections: Sequence[str] | None) -> str:
    return f"<h2>{title}</h2>\n" + "\n".join(sections) if sections else ""


def _folded(title: str, sections: Sequence[str] | None) -> str:
    return f"<details><summary>{title}</summary>\n" + "\n".join(sections) + "\n</details>" if sections else ""


def _settings(arms: Sequence[ArmRecord]) -> str:
    """The config keys in which the arms differ, an arm a row; without pre-training, which differs in most."""
    able = [arm for arm in arms if arm.runs and arm.runs[0].config and arm.kind != "pretraining"]
    if len(able) < 2:
        return ""
    different = differences([arm.runs[0] for arm in able])
    for key in (*_SEED_KEYS, "start.from"):
        different.pop(key, None)
    if not different:
        return "<h2>Settings</h2>\n<p>The configs of the arms differ only in their start.</p>"
    names = list(different)
    head = "".join(f'<th scope="col">{breakable(key).replace(".", ".<wbr>")}</th>' for key in names)
    columns = [value_cells([setting_text(value) for value in different[key]]) for key in names]
    body = "".join(
        f'<tr><th scope="row">{breakable(arm.name)}</th><td>{breakable(arm.start) or "scratch"}</td>'
        f"{''.join(column[index] for column in columns)}</tr>"
        for index, arm in enumerate(able)
    )
    return (
        '<h2>Settings that differ</h2>\n<div class="wide"><table class="settings"><thead><tr><th scope="col">Arm</th>'
        f'<th scope="col">Start</th>{head}</tr></thead><tbody>{body}</tbody></table></div>\n'
        '<p class="quiet">Without seeds and folders. Bold: values that differ from the most common one.</p>'
    )


def _states(experiment: ExperimentRecord) -> str:
    """The runs that are not complete."""
    waiting = [trial for trial in experiment.trials if trial.state != "complete"]
    if not waiting:
        return ""
    under_way, diverged = (
        "".join(
            f"<li>{escape(trial.name)}: {trial.share:.0%} of {tokens_text(trial.tokens)} tokens</li>"
            for trial in waiting
            if trial.state == state
        )
        for state in ("under way", "diverged")
    )
    rest = ", ".join(breakable(trial.name) for trial in waiting if trial.state == "not begun")
    return (
        "<h2>Runs that are not complete</h2>\n"
        + (f"<p>Under way, or stopped before their end:</p><ul>{under_way}</ul>" if under_way else "")
        + (f"<p>Diverged and ended:</p><ul>{diverged}</ul>" if diverged else "")
        + (f"<p>Not begun: {rest}.</p>" if rest else "")
    )


def _flat_runs(experiment: ExperimentRecord, measures: Sequence[Measure]) -> list[dict[str, Any]]:
    """Every run of the experiment, including those that have not started."""
    flat = []
    for arm in experiment.arms:
        for trial in arm.trials:
            keys: dict[str, Any] = {"run": trial.name, "arm": arm.name, "seed": trial.seed, "state": trial.state}
            keys |= {"steps": trial.run.steps if trial.run else 0, "planned_steps": trial.steps}
            if trial.run and trial.state == "complete":
                keys |= run_measures(row_of(trial.run, trial.name, arm.kind), measures)
            flat.append(keys)
    return flat
