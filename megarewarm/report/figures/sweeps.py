"""The figures of a sweep's final losses against the values on its axis, such as peak, replay or warmup."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from megarewarm.report.figures import style
from megarewarm.report.numbers.arms import ArmRow
from megarewarm.report.numbers.experiment import ArmRecord
from megarewarm.report.numbers.runs import LENGTHS, distinct_lengths, same_length
from megarewarm.report.numbers.seeds import Spread
from megarewarm.spelling import rate_text, tokens_text

REPLAY = "replay.fraction"
_TICK_FONT, _LETTER = 8.0, 0.58  # points, and a letter's width as a share of them
_TICKS_WIDTH = 185.0  # points between the outermost ticks
_PANELS = (("upstream_after", "Upstream loss"), ("downstream_after", "Downstream loss"), ("average_after", "Average of both"))


@dataclasses.dataclass(frozen=True)
class AxisLine:
    """Final losses along one numeric axis, of arms with the same validation sets and the same length, unless that is the axis.

    ``label`` gives the values of the other axes, and tokens and sets if they differ between arms; or ''. ``colour`` is that of
    the other axis' value, None if colours don't distinguish the lines by it."""

    label: str
    values: list[float]
    rows: list[ArmRow]
    colour: str | None = None


def number_of(axis: str, value: Any) -> float | None:
    """An axis' value as a number: 0.001, '1%' -> 1; no replay is 0. ``None`` for labels."""
    if value is None and axis == REPLAY:
        return 0.0
    if isinstance(value, str):
        text = value.strip()
        try:
            value = float(text.removesuffix("%"))
        except ValueError:
            return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(f"{value:.9g}")  # 0.1 + 0.2 is 0.3


def axis_lines(rows: Sequence[ArmRow], group: str) -> tuple[str, list[AxisLine]] | None:
    """The first axis of ``group`` with at least three different numbers, and the lines along it; ``None`` if there is none.

    An axis that mixes percentages with numbers other than 0 has no common unit and is no axis.
    """
    inside = [row for row in rows if group in row.arm.groups and row.mean("upstream_after") is not None]
    for axis in dict.fromkeys(axis for row in inside for axis in row.arm.groups[group]):
        told = [row.arm.groups[group].get(axis) for row in inside]
        numbers = [number_of(axis, value) for value in told]
        percent = any(isinstance(value, str) and value.strip().endswith("%") for value in told)
        if not is_numeric(axis, told) or len(set(numbers)) < 3:
            continue
        lines: dict[str, list[tuple[float, ArmRow]]] = {}
        lengths = [] if axis in LENGTHS else distinct_lengths([row.mean("tokens") or 0.0 for row in inside])
        for row, number in zip(inside, numbers, strict=True):
            others = [f"{key} {value_text(key, value)}" for key, value in row.arm.groups[group].items() if key != axis]
            own = row.mean("tokens") or 0.0
            others += [f"{tokens_text(length)} tokens" for length in lengths if same_length(own, length)][: len(lengths) > 1]
            if len({other.arm.sets for other in inside}) > 1:
                others.append(f"on {' and '.join(itertools.chain(*row.arm.sets))}")
            lines.setdefault(", ".join(others), []).append((number or 0.0, row))
        ordered = {label: sorted(points, key=lambda point: point[0]) for label, points in lines.items()}
        drawn = [AxisLine(k, [x for x, _ in v], [row for _, row in v]) for k, v in ordered.items()]
        return f"{axis} (%)" if percent else axis, _coloured(drawn, axis, group)
    return None


def _coloured(lines: list[AxisLine], axis: str, group: str) -> list[AxisLine]:
    """The lines in the order and the colours of the values of the other axis, if there is one that distinguishes them."""
    axes = list(lines[0].rows[0].arm.groups[group])
    others = [other for other in axes if other != axis]
    values = [line.rows[0].arm.groups[group].get(others[0]) if len(others) == 1 else None for line in lines]
    if len(others) != 1 or len({value_text(others[0], value) for value in values}) < len(lines):
        return lines
    colours = axis_colours(others[0], values, axes.index(others[0]))
    by_text = {value_text(others[0], value): line for line, value in zip(lines, values, strict=True)}
    return [dataclasses.replace(by_text[text], colour=colour) for text, colour in colours.items()]


def axis_colours(axis: str, values: Sequence[Any], place: int) -> dict[str, str]:
    """A colour for each distinct value by its text, in their order: a sequence for numbers, the palette without black for
    labels. ``place``: the index of the axis in its sweep."""
    texts = ordered_values(axis, values)
    if is_numeric(axis, values):
        return dict(zip(texts, style.sequence(len(texts), place), strict=True))
    return {text: style.colour(style.place_beside_black(index)) for index, text in enumerate(texts)}


def value_text(axis: str, value: Any) -> str:
    """A value on an axis as its tick: '2e-3', '1%', '0' for no replay, labels as they are."""
    number = number_of(axis, value)
    if number is None:
        return str(value)
    return _tick(number, axis) + "%" * (isinstance(value, str) and value.strip().endswith("%"))


def varied_axes(arms: Sequence[ArmRecord], group: str) -> list[str]:
    """The axes of ``group`` on which the arms, all members of it, differ."""
    axes = dict.fromkeys(axis for arm in arms for axis in arm.groups[group])
    return [axis for axis in axes if len({value_text(axis, arm.groups[group].get(axis)) for arm in arms}) > 1]


def ordered_values(axis: str, values: Sequence[Any]) -> list[str]:
    """The distinct values as text: ascending if all are numbers of one unit, else in the given order."""
    texts = {value_text(axis, value): number_of(axis, value) for value in values}
    return sorted(texts, key=lambda text: texts[text] or 0.0) if is_numeric(axis, values) else list(texts)


def is_numeric(axis: str, values: Sequence[Any]) -> bool:
    """Whether all values are numbers of one unit: percentages have none in common with numbers other than 0."""
    numbers = [number_of(axis, value) for value in values]
    percent = [isinstance(value, str) and value.strip().endswith("%") for value in values]
    mixed = any(percent) and any(n for n, p in zip(numbers, percent, strict=True) if not p)
    return None not in numbers and not mixed


def draw_axis(axis: str, lines: Sequence[AxisLine]) -> Figure:
    """Final upstream and downstream loss and their average against ``axis``: means, with the seeds' range as bands."""
    values = sorted({value for line in lines for value in line.values})
    place = _placing(values)
    with style.style():
        figure = style.new_figure(11.0, 3.4)
        for column, (measure, title) in enumerate(_PANELS):
            axes = figure.add_axes((0.06 + column * 0.325, 0.17, 0.275, 0.66))
            for index, line in enumerate(lines):
                spreads = [row.spread(measure) for row in line.rows]
                told = [(place[x], spread) for x, spread in zip(line.values, spreads, strict=True) if spread.values]
                xs, means = [x for x, _ in told], [spread.mean or 0.0 for _, spread in told]
                colour, marker = line.colour or style.colour(index), style.marker(index)
                lows, highs = [spread.low or 0.0 for _, spread in told], [spread.high or 0.0 for _, spread in told]
                axes.fill_between(xs, lows, highs, color=colour, alpha=0.18, linewidth=0)
                axes.vlines(xs, lows, highs, color=colour, linewidth=0.9)  # a single point has no band
                axes.plot(
                    xs, means, color=colour, marker=marker, markersize=6, linewidth=1.5, label=line.label or None,
                    linestyle=style.dashes(index), markeredgecolor="white", markeredgewidth=0.6,
                )  # fmt: skip
            shown = _legible({value: _tick(value, axis) for value in values}, place)
            axes.tick_params(axis="x", labelsize=_TICK_FONT)
            axes.xaxis.set_major_locator(FixedLocator([place[value] for value in shown]))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticklabels([_tick(value, axis) for value in shown])
            axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
            axes.set_xlabel(axis)
            axes.set_title(title)
            axes.margins(x=0.08, y=0.12)
            style.quiet_axes(axes)
        if any(line.label for line in lines):
            figure.axes[0].legend(frameon=False, fontsize=8.5)
        return figure


def describe_axis(axis: str, lines: Sequence[AxisLine]) -> str:
    """Alternative text of ``draw_axis``."""
    points = [
        f"{_tick(value, axis)}: {row.mean('upstream_after'):.3f} and {down:.3f}"
        for line in lines
        for value, row in zip(line.values, line.rows, strict=True)
        if (down := row.mean("downstream_after")) is not None
    ]
    return f"Line charts of final upstream and downstream loss against {axis}. {'; '.join(points)}."


def caption_axis(lines: Sequence[AxisLine]) -> str:
    """How to read ``draw_axis``."""
    if any(row.seeds[0] > 1 for line in lines for row in line.rows):
        return "Lines are means over the complete seeds, bands reach from the lowest to the highest seed."
    return "One seed each."


def error_bars(spreads: Sequence[Spread]) -> np.ndarray:
    """Distances from the mean down to the lowest and up to the highest value, (2, points)."""
    return np.array([[(s.mean or 0) - (s.low or 0) for s in spreads], [(s.high or 0) - (s.mean or 0) for s in spreads]])


def _placing(values: Sequence[float]) -> dict[float, float]:
    """The position of each value: its logarithm if they span more than a factor of 5, with 0 one step left of the least."""
    above = [value for value in values if value > 0]
    if values[0] < 0 or not above or above[-1] <= 5 * above[0]:
        return {value: value for value in values}
    logs = np.log10(above)
    step = float(np.median(np.diff(logs))) if len(logs) > 1 else 1.0
    return {0.0: float(logs[0]) - step} | dict(zip(above, logs.tolist(), strict=True))


def _legible(texts: dict[float, str], place: dict[float, float]) -> list[float]:
    """The values whose tick labels, ``texts``, fit side by side."""
    values = list(texts)
    span = place[values[-1]] - place[values[0]]
    shown = [values[0]]
    for value in values[1:]:
        letters = (len(texts[value]) + len(texts[shown[-1]])) / 2 + 0.5
        if (place[value] - place[shown[-1]]) / span * _TICKS_WIDTH >= letters * _LETTER * _TICK_FONT:
            shown.append(value)
    return shown


def _tick(value: float, axis: str = "") -> str:
    return rate_text(value) if value and (abs(value) < 1e-3 or axis.endswith("lr")) else f"{value:g}"
