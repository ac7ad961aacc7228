"""The figure of a sweep over two axes: a grid of final losses as numbers, the lowest marked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import matplotlib.colors
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from megarewarm.report.figures import style
from megarewarm.report.figures.sweeps import ordered_values, value_text, varied_axes
from megarewarm.report.numbers.arms import ArmRow
from megarewarm.report.numbers.runs import LENGTHS, distinct_lengths
from megarewarm.spelling import loss_text

MEASURES = (
    ("average_after", "Average of both losses"),
    ("upstream_after", "Upstream loss"),
    ("downstream_after", "Downstream loss"),
)
_FAR = 4.0  # times the median's distance from the lowest: cells beyond it have the same colour
_COLOURS = matplotlib.colors.LinearSegmentedColormap.from_list("lower_is_darker", ("#0b4f7d", "#56a0cf", "#eef4f9"))


@dataclasses.dataclass(frozen=True)
class SweepGrid:
    """A sweep over the two ``axes``, the first along the columns: ``cells[row][column]``, None without a complete arm.

    ``columns`` and ``rows`` are the axes' values as text, ascending if they are numbers.
    """

    axes: tuple[str, str]
    columns: list[str]
    rows: list[str]
    cells: list[list[ArmRow | None]]

    @property
    def measures(self) -> list[tuple[str, str]]:
        """The measures that some cell has, with their titles."""
        return [(key, title) for key, title in MEASURES if any(row.mean(key) is not None for row in self.arms())]

    def arms(self) -> list[ArmRow]:
        """The arms in the cells, row by row."""
        return [row for line in self.cells for row in line if row is not None]

    def place(self, arm: ArmRow) -> str:
        """'schedule.max_lr 2e-3 with replay.fraction 0.05'."""
        at = next((r, line.index(arm)) for r, line in enumerate(self.cells) if arm in line)
        return f"{self.axes[0]} {self.columns[at[1]]} with {self.axes[1]} {self.rows[at[0]]}"

    def ranked(self, measure: str) -> list[ArmRow]:
        """The arms without a diverged seed by their means of ``measure``, the lowest first."""
        able = [row for row in self.arms() if row.mean(measure) is not None and not row.spread(measure).others]
        return sorted(able, key=lambda row: row.mean(measure) or 0.0)


def grid_of(rows: Sequence[ArmRow], group: str) -> SweepGrid | None:
    """The sweep ``group`` as a grid; ``None`` if not exactly two axes vary, fewer than four arms are complete, or their final
    losses are not comparable because of other validation sets or another length that is not an axis."""
    inside = [row for row in rows if group in row.arm.groups and row.seeds[0]]
    axes = list(dict.fromkeys(axis for row in inside for axis in row.arm.groups[group]))
    inside = [row for row in inside if all(axis in row.arm.groups[group] for axis in axes)]
    axes = varied_axes([row.arm for row in inside], group)
    if len(axes) != 2 or len(inside) < 4 or len({row.arm.sets for row in inside}) > 1:
        return None
    if not set(axes) & set(LENGTHS) and len(distinct_lengths([row.mean("tokens") or 0.0 for row in inside])) > 1:
        return None
    columns, lines = (ordered_values(axis, [row.arm.groups[group][axis] for row in inside]) for axis in axes)
    cells: list[list[ArmRow | None]] = [[None] * len(columns) for _ in lines]
    for row in inside:
        column, line = (value_text(axis, row.arm.groups[group][axis]) for axis in axes)
        if cells[lines.index(line)][columns.index(column)] is not None:
            return None
        cells[lines.index(line)][columns.index(column)] = row
    return SweepGrid((axes[0], axes[1]), columns, lines, cells)


def draw_grid(grid: SweepGrid) -> Figure:
    """One panel each for average, upstream and downstream loss: means over the seeds in cells, darker if lower, the lowest
    framed."""
    measures = grid.measures
    beside = len(measures) * len(grid.columns) * (0.08 * max(5, *map(len, grid.columns)) + 0.06) < 9.6
    across, down = (len(measures), 1) if beside else (1, len(measures))
    several = any(len(row.spread(key).values) > 1 for row in grid.arms() for key, _ in measures)
    tall = 0.52 if several else 0.4
    left = 0.35 + 0.085 * max(map(len, grid.rows))
    panel = tall * len(grid.rows) + 0.87
    with style.style():
        figure = style.new_figure(11.0, panel * down + 0.1)
        height = figure.get_figheight()
        width = (10.8 - left - 0.22 * (across - 1)) / across
        for index, (key, title) in enumerate(measures):
            x = left + (width + 0.22) * (index if beside else 0)
            y = height - panel * ((0 if beside else index) + 1) + 0.5
            axes = figure.add_axes((x / 11.0, y / height, width / 11.0, tall * len(grid.rows) / height))
            _draw_panel(axes, grid, key)
            axes.set_title(title)
            axes.set_xlabel(grid.axes[0])
            axes.set_xticks(np.arange(len(grid.columns)) + 0.5, grid.columns)
            first = index == 0 or not beside
            axes.set_yticks(np.arange(len(grid.rows)) + 0.5, grid.rows if first else [])
            if first:
                axes.set_ylabel(grid.axes[1])
        return figure


def _draw_panel(axes: Axes, grid: SweepGrid, key: str) -> None:
    found = [[None if row is None else row.mean(key) for row in line] for line in grid.cells]
    means = np.array(found, dtype=np.float64)  # NaN for None
    known = means[np.isfinite(means)]
    low, middle = float(known.min()), float(np.median(known))
    norm = matplotlib.colors.Normalize(low, max(min(float(known.max()), low + _FAR * (middle - low)), low + 1e-6))
    axes.pcolormesh(np.ma.masked_invalid(means), cmap=_COLOURS, norm=norm, edgecolors="white", linewidth=2)
    axes.set_facecolor("#f3f4f6")
    best = loss_text(next((row.mean(key) for row in grid.ranked(key)), None))
    for (line, column), mean in np.ndenumerate(means):
        row = grid.cells[line][column]
        text, colour = ("diverged" if row is not None and row.spread(key).others else "–"), style.QUIET
        lowest = False
        if row is not None and math.isfinite(mean):
            spread = row.spread(key)
            lowest = loss_text(mean) == best and not spread.others
            text = loss_text(mean) + (f"\n± {spread.deviation:.3f}" if spread.deviation is not None else "")
            colour = "white" if np.dot(_COLOURS(norm(mean))[:3], (0.2126, 0.7152, 0.0722)) < 0.55 else style.INK
            if spread.others:
                text += f"\n{spread.others} diverged"
        axes.text(
            column + 0.5, line + 0.5, text, ha="center", va="center", color=colour, linespacing=1.15,
            fontsize=9 if len(grid.columns) <= 12 else 7, fontweight="bold" if lowest else "normal",
        )  # fmt: skip
        if lowest:
            frame = Rectangle((column, line), 1, 1, fill=False, edgecolor="#d55e00", linewidth=2.6, clip_on=False, zorder=3)
            axes.add_patch(frame)
    axes.invert_yaxis()
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    style.quiet_axes(axes)


def caption_grid(grid: SweepGrid) -> str:
    """How to read ``draw_grid``."""
    several = any(row.spread(key).deviation is not None for row in grid.arms() for key, _ in grid.measures)
    over = "Means over the complete seeds ± their standard deviation" if several else "Final losses, one seed each"
    return f"{over}, in {grid.arms()[0].arm.unit}. Darker is lower; framed: the lowest."


def describe_grid(grid: SweepGrid) -> str:
    """Alternative text of ``draw_grid``: the lowest and the highest of each panel."""
    told = []
    for key, title in grid.measures:
        if ranked := grid.ranked(key):
            ends = [f"{loss_text(row.mean(key))} at {grid.place(row)}" for row in (ranked[0], ranked[-1])]
            told.append(f"{title}: lowest {ends[0]}, highest {ends[1]}")
    return f"Heat maps over {grid.axes[0]} and {grid.axes[1]}. {'; '.join(told)}."
