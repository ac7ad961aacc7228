"""The figure of candidates for a start: each score against what it should tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from megarewarm.report.figures import style
from megarewarm.report.figures.labels import place_labels

_WIDTH, _HEIGHT = 4.4, 3.5  # inches of a panel
_ACROSS = 2  # panels


@dataclass(frozen=True)
class ScorePanel:
    """One score: its values, None where a candidate has none, and what its axis and title say."""

    values: Sequence[float | None]
    label: str
    title: str


def draw_starts(
    names: Sequence[str], decayed: Sequence[bool | None], truth: Sequence[float], what: str, panels: Sequence[ScorePanel]
) -> Figure:
    """Scatter panels, candidates named by ``names``: each score against ``truth``, which is called ``what``. ``decayed``:
    whether a candidate's rate had fallen, None where it is not known."""
    kinds = {False: ("rate near its peak", style.colour(0), "o"), True: ("rate has decayed", style.colour(1), "s")}
    unknown = ("schedule not recorded", style.QUIET, "D")
    with style.style():
        places = []
        across = min(_ACROSS, len(panels))
        down = -(-len(panels) // across)
        figure = style.new_figure(_WIDTH * across, _HEIGHT * down + 0.4)
        axes = figure.subplots(down, across, sharey=True, squeeze=False).ravel()
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        for axis, panel in zip(axes, panels, strict=False):
            shown = [i for i, value in enumerate(panel.values) if value is not None and np.isfinite([value, truth[i]]).all()]
            xs = np.array([panel.values[i] for i in shown], dtype=np.float64)
            ys = np.array([truth[i] for i in shown])
            for i, x, y in zip(shown, xs, ys, strict=True):
                label, colour, mark = unknown if (kind := decayed[i]) is None else kinds[kind]
                axis.plot([x], [y], mark, color=colour, markersize=8, markeredgecolor="white", zorder=3, label=label)
            axis.set_xlabel(panel.label)
            axis.set_title(panel.title, fontsize=10)
            style.quiet_axes(axis)
            axis.margins(0.14)
            places.append((axis, xs, ys, [names[i] for i in shown]))
        for axis in axes[::across]:
            axis.set_ylabel(what)
        figure.tight_layout(rect=(0, 0.34 / figure.get_figheight(), 1, 1))
        for axis, xs, ys, texts in places:  # after the layout, when the panels have their final size
            if texts:
                place_labels(axis, xs, ys, texts, [style.INK] * len(texts), font=9)
        marks = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(marks.values(), marks.keys(), loc="lower center", ncols=3, frameon=False, fontsize=9)
        return figure
