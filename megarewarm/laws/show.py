"""The figure of an advice: losses against peak and replay, and predictions of held-out levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megarewarm.laws.advice import Advice
from megarewarm.laws.answer import Recommendation
from megarewarm.laws.sections import keys_of
from megarewarm.report.figures import style
from megarewarm.report.figures.labels import place_labels
from megarewarm.report.figures.lines import short_labels
from megarewarm.spelling import rate_text

_NAMED = 12  # most arms that a panel names
_NAME_FONT = 7.0  # points
_GROUPS = 16  # lines of one panel
_AXES = {"peak": "peak learning rate", "replay": "replay fraction"}

Settings = dict[str, Any]
Line = list[tuple[float, float]]


def draw_advice(advice: Advice, path: Path) -> bool:
    """Write ``advice_figure`` as the PNG at ``path``. Returns whether there was a figure."""
    figure = advice_figure(advice)
    if figure is None:
        return False
    figure.savefig(path, dpi=130)
    return True


def advice_figure(advice: Advice) -> Figure | None:
    """Two columns, upstream and downstream; for every question one row per varied axis and one for the held-out levels.
    ``None`` if no law was fitted."""
    rows: list[tuple[Recommendation, str]] = []
    for one in advice.answers:
        if any(section.laws for section in one.sections):
            varied = [axis for axis in _AXES if len({_settings(keys_of(run))[axis] for run in one.question.runs}) > 1]
            rows += [(one, axis) for axis in (*varied, "left out")]
    if not rows:
        return None
    columns = max(len(one.question.roles) for one, _ in rows)
    figure = style.new_figure(5.6 * columns, 3.9 * len(rows) + 0.4)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (one, what) in zip(axes, rows, strict=True):
        for axis, role in zip(row, one.question.roles, strict=False):
            if what == "left out":
                _draw_left_out(axis, one, role)
            else:
                _draw_losses(axis, one, role, what)
            if len(advice.answers) > 1:
                axis.set_title(f"{axis.get_title(loc='left')}\n{_group(one)}", fontsize=9, loc="left")
            axis.tick_params(labelsize=8)
        for axis in row[len(one.question.roles) :]:
            axis.set_visible(False)
    figure.suptitle(advice.title, fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    for row, (one, what) in zip(axes, rows, strict=True):  # after the layout, when the panels have their final size
        for axis, role in zip(row, one.question.roles, strict=False):
            if what == "left out":
                _name_left_out(axis, one, role)
    return figure


def _group(one: Recommendation) -> str:
    """The compared arms, named by what they share."""
    names, run = one.question.arms, one.question.runs[0]
    start = short_labels([str(run.config.get("start", {}).get("from", "a checkpoint"))])[0]
    return f"{len(names)} arms from {start}, {run.steps} steps ({short_labels([names[0]])[0]}{', ...' * (len(names) > 1)})"


def _settings(keys: dict[str, Any]) -> Settings:
    """The settings that distinguish runs: numbers for the axes, texts for the rest. The minimum rate is a share of the peak."""
    schedule, replay = keys["schedule"], keys["replay"]
    peak = schedule.get("max_lr")
    told: Settings = {"peak": float(f"{peak:.5g}") if isinstance(peak, int | float) else 0.0}
    told["replay"] = float(replay["fraction"]) if replay else 0.0
    for name, value in schedule.items():
        if name not in ("max_lr", "length"):
            share = name in ("min_lr", "constant_lr") and peak
            told[name] = f"{value / peak:.2g} of the peak" if share else str(value)
    return told


def _label(settings: Settings, axis: str, varied: Sequence[str]) -> str:
    """The line of a panel that a run belongs to: what varies besides the axis."""
    parts = []
    for name in varied:
        if name != axis and name in settings:
            value = settings[name]
            text = f"{100 * value:.3g}%" if name == "replay" else rate_text(value) if name == "peak" else value
            parts.append(text if name == "curve" else f"{name} {text}")
    return ", ".join(parts)


def _draw_losses(axis: Axes, one: Recommendation, role: str, along: str) -> None:
    """Final loss against peak or replay, one colour per combination of other settings: crosses measured, lines predicted."""
    told = [(_settings(keys_of(run)), run) for run in one.question.runs]
    runs = sorted(told, key=lambda pair: (str(pair[0].get("curve")), pair[0]["replay"], pair[0]["peak"]))
    names = dict.fromkeys(name for settings, _ in runs for name in settings)
    varied = [name for name in names if len({settings.get(name) for settings, _ in runs}) > 1]
    measured: dict[str, Line] = {}
    for settings, run in runs:
        change = run.final(role) - run.start(role)
        place = (settings[along], one.question.mean_start(role) + change)
        measured.setdefault(_label(settings, along, varied), []).append(place)
    kind = "schedule" if along == "peak" else "replay"
    predicted: dict[str, list[tuple[float, float, float]]] = {}
    for section in one.sections:
        for made in section.predictions:
            settings = _settings(made.keys)
            label = _label(settings, along, varied)
            if section.kind == kind and role in made.losses and label in measured:
                predicted.setdefault(label, []).append((settings[along], made.losses[role], made.bands[role]))
    drawn = list(measured.items())[:_GROUPS]
    beside = [name for name in varied if name != along]
    colours = [style.colour(index) for index in range(len(drawn))]
    if beside in (["peak"], ["replay"]):  # one other axis: its colour sequence, as in the report
        colours = style.sequence(len(drawn), axis=int(beside == ["replay"]))
    for index, (label, points) in enumerate(drawn):
        colour = colours[index]
        axis.plot(*np.array(points).T, "x", color=colour, label=label or "measured", clip_on=False)
        if label in predicted and len(predicted[label]) > 1:
            x, y, band = np.array(sorted(predicted[label])).T
            axis.plot(x, y, color=colour, linestyle=style.dashes(index), linewidth=1.3)
            axis.fill_between(x, y - band, y + band, color=colour, alpha=0.1, linewidth=0)
    _scale(axis, along, sorted({settings[along] for settings, _ in runs}))
    how = "crosses measured, lines predicted" if predicted else "measured; the data are insufficient to predict"
    axis.set_title(f"{role} loss against {'peak' if along == 'peak' else 'replay'}: {how}", fontsize=9, loc="left")
    axis.set_xlabel(_AXES[along], fontsize=8)
    axis.set_ylabel(f"final {role} loss", fontsize=8)
    if len(measured) > 1:
        hidden = len(measured) - _GROUPS
        axis.legend(fontsize=6.5, frameon=False, title=f"{hidden} more not drawn" if hidden > 0 else None)


def _scale(axis: Axes, along: str, values: list[float]) -> None:
    """Ticks at tested values; a logarithmic scale for rates, a square-root scale for fractions, which separates small ones."""
    if along == "peak":
        axis.set_xscale("log")
        texts = [rate_text(value) for value in values]
    else:
        root: Callable[[Any], Any] = lambda x: np.sqrt(np.maximum(x, 0.0))  # noqa: E731
        axis.set_xscale("function", functions=(root, np.square))
        texts = [f"{100 * value:.3g}%" for value in values]
    axis.minorticks_off()
    axis.set_xticks(values, texts, fontsize=7)


def _points(one: Recommendation, role: str) -> list[tuple[str, float, float, float]]:
    """Arm, measured, predicted and band of every held-out arm inside the tested range."""
    return [
        (arm.arm, arm.measured, arm.predicted, section.laws[role].trial.band)
        for section in one.sections
        if role in section.laws
        for arm in section.laws[role].trial.counted()
    ]


def _draw_left_out(axis: Axes, one: Recommendation, role: str) -> None:
    """Predicted against measured final loss of arms whose level was held out of the fit."""
    for index, kind in enumerate(("schedule", "replay")):
        points = [
            (arm.measured, arm.predicted, section.laws[role].trial.band)
            for section in one.sections
            if section.kind == kind and role in section.laws
            for arm in section.laws[role].trial.counted()
        ]
        if points:
            measured, predicted, band = np.array(points).T
            colour = style.colour(index)
            width = np.where(np.isfinite(band), band, 0.0)
            look: Any = {"fmt": style.marker(index), "markersize": 4, "alpha": 0.8, "capsize": 2, "elinewidth": 0.8}
            axis.errorbar(measured, predicted, yerr=width, color=colour, label=f"{kind} law", **look)
    told = _points(one, role)
    if told:
        ends = [min(min(m, p) for _, m, p, _ in told), max(max(m, p) for _, m, p, _ in told)]
        axis.plot(ends, ends, color="0.6", linewidth=1, zorder=1)
        axis.legend(fontsize=7, frameon=False)
    axis.margins(x=0.1, y=0.12)
    axis.set_title(f"{role} loss of held-out levels", fontsize=9, loc="left")
    axis.set_xlabel("measured", fontsize=8)
    axis.set_ylabel("predicted, 90 % band", fontsize=8)


def _name_left_out(axis: Axes, one: Recommendation, role: str) -> None:
    """Write the arms' names beside their points; if there are many, only those with the largest errors."""
    worst: dict[str, tuple[str, float, float, float]] = {}
    told = _points(one, role)
    for point in told:
        if point[0] not in worst or abs(point[2] - point[1]) > abs(worst[point[0]][2] - worst[point[0]][1]):
            worst[point[0]] = point
    if not worst:
        return
    names = dict(zip(worst, short_labels(list(worst)), strict=True))
    named = sorted(worst.values(), key=lambda point: -abs(point[2] - point[1]))[:_NAMED]
    bars = [(m, p + band * share) for _, m, p, band in told if math.isfinite(band) for share in np.linspace(-1, 1, 9)]
    bars += [(m, p) for _, m, p, _ in told]
    xs, ys = np.array([(m, p) for _, m, p, _ in named]).T
    place_labels(
        axis, xs, ys, [names[arm] for arm, *_ in named], ["black"] * len(named), points=np.array(bars), font=_NAME_FONT
    )
