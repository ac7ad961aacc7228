"""The figure of forgetting against adaptation: one point per run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from megarewarm.report.figures import style
from megarewarm.report.figures.labels import place_labels
from megarewarm.report.figures.lines import Line
from megarewarm.report.numbers.runs import RunRow, distinct_lengths
from megarewarm.spelling import listed, rate_text, signed_text, tokens_text


def draw_tradeoff(lines: Sequence[Line]) -> Figure | None:
    """Adaptation against forgetting, one point per run, with its tokens if they differ; ``None`` for fewer than two."""
    table = [line.row for line in lines if line.row is not None]
    length = " · {}" if len(distinct_lengths([row.tokens for row in _pointed(table)])) > 1 else ""
    points = [
        (line, row.forgetting, row.adaptation, length.format(tokens_text(row.tokens)))
        for line, row in zip(lines, table, strict=True)
        if row.forgetting is not None and row.adaptation is not None
    ]
    if len(points) < 2:
        return None
    with style.style():
        figure = style.new_figure(8.2, 5.4)
        axes = figure.add_axes((0.105, 0.115, 0.865, 0.815))
        xs, ys = np.array([x for _, x, *_ in points]), np.array([y for _, _, y, _ in points])
        for side, values in ((axes.set_xlim, xs), (axes.set_ylim, ys)):
            side(*style.limits(float(values.min()), float(values.max())))
        zero = [
            side(0, color=style.QUIET, linewidth=0.8)
            for side, (low, high) in ((axes.axhline, axes.get_ylim()), (axes.axvline, axes.get_xlim()))
            if low < 0 < high
        ]
        for line, x, y, _ in points:
            axes.plot([x], [y], line.marker, color=line.colour, markersize=9, markeredgecolor="white", zorder=3)
        axes.set_xlabel(f"forgetting: rise of the upstream loss ({lines[0].run.unit})")
        axes.set_ylabel(f"adaptation: fall of the downstream loss ({lines[0].run.unit})")
        signed_ticks(axes)
        style.quiet_axes(axes)
        axes.set_title("What each run learned, and what it forgot")
        corner = axes.text(0.012, 0.985, "↖ better", transform=axes.transAxes, color=style.QUIET, va="top")
        texts = [f"{line.label}  {rate_text(line.run.peak_lr)}{told}" for line, _, _, told in points]
        place_labels(axes, xs, ys, texts, [style.for_text(line.colour) for line, *_ in points], taken=[corner, *zero])
        return figure


def _pointed(table: Sequence[RunRow]) -> list[RunRow]:
    """The rows that are drawn."""
    return [row for row in table if row.forgetting is not None and row.adaptation is not None]


def caption_tradeoff(table: Sequence[RunRow]) -> str:
    """What the points are, which of them are comparable, and which runs have none."""
    text = "Both relative to the run's start checkpoint; up and left is better."
    drawn = _pointed(table)
    unlike = ["numbers of tokens"] if len(distinct_lengths([row.tokens for row in drawn])) > 1 else []
    unlike += ["starts"] if len({row.origin for row in drawn}) > 1 else []
    unlike += ["validation sets"] if len({row.sets for row in drawn}) > 1 else []
    if unlike:
        text += f" The runs have different {listed(unlike)}: compare only those with the same."
    left_out = [row for row in table if row.kind != "pretraining" and row not in drawn]
    for why, lost in (("because a loss is not finite", True), ("because losses of a start checkpoint are missing", False)):
        if names := [row.label for row in left_out if row.diverged == lost]:
            text += f" Without a point {why}: {', '.join(names)}."
    return text


def describe_tradeoff(table: Sequence[RunRow]) -> str:
    """Alternative text of ``draw_tradeoff``."""
    points = [
        f"{row.label}: forgetting {signed_text(row.forgetting)}, adaptation {signed_text(row.adaptation)}"
        for row in _pointed(table)
    ]
    return "Scatter chart of adaptation against forgetting. " + "; ".join(points) + "."


def signed_ticks(axes: Axes) -> None:
    """Ticks with signs on both axes, with as many decimals as distinguish them."""
    for axis in (axes.xaxis, axes.yaxis):
        first, second = axis.get_majorticklocs()[:2]
        step = second - first
        decimals = next((d for d in range(6) if abs(round(step * 10**d) - step * 10**d) < 1e-6), 6)
        axis.set_major_formatter(FuncFormatter(lambda value, _, decimals=decimals: _signed(value, decimals)))


def _signed(value: float, decimals: int) -> str:
    text = f"{abs(value):.{decimals}f}"
    return "0" if float(text) == 0 else f"+{text}" if value > 0 else f"\N{MINUS SIGN}{text}"
