"""The figure of tests on tasks: accuracy over tokens, and the items that were lost and won since the start."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megarewarm.record.events import TaskEvent
from megarewarm.report.figures import style
from megarewarm.report.figures.curves import legend_above, legend_columns, token_axis
from megarewarm.report.figures.lines import Line
from megarewarm.report.numbers.tasks import TaskKey, task_labels, tests_of

CAPTION = (
    "Left: items whose right choice the model finds most likely; dotted: guessing. Right: items that were right before the run "
    "and are wrong now (lost, solid), and the other way round (won, dashed), guesses included."
)


def draw_abilities(lines: Sequence[Line]) -> Figure | None:
    """A row for each task: its accuracy, and the items lost and won. ``None`` without any test."""
    lines = [line for line in lines if line.run.tests]
    labels = _labels(lines)
    if not labels:
        return None
    with style.style():
        head = 0.55 + 0.21 * math.ceil(len(lines) / legend_columns(lines))
        total = head + 2.9 * len(labels)
        figure = style.new_figure(11.0, total)
        rows = figure.subplots(len(labels), 2, squeeze=False)
        figure.subplots_adjust(left=0.075, right=0.985, top=1 - head / total, bottom=0.6 / total, hspace=0.55, wspace=0.18)
        for (left, right), (key, label) in zip(rows, labels.items(), strict=True):
            for line in lines:
                _draw_line(left, right, line, tests_of(line.run).get(key, []))
            left.set_title(f"{label}: accuracy")
            right.set_title(f"{label}: items lost and won")
            for axes in (left, right):
                axes.set_ylabel("% of items")
                axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
                token_axis(axes)
        legend_above(figure, lines)
        return figure


def _draw_line(left: Axes, right: Axes, line: Line, tests: Sequence[TaskEvent]) -> None:
    if not tests:
        return
    tokens = [test.tokens - line.run.tokens_before for test in tests]
    colour, marker = line.colour, line.marker
    left.plot(tokens, [100 * test.accuracy for test in tests], color=colour, linestyle=line.dashes, marker=marker, markersize=5)
    left.axhline(100 * tests[-1].chance, color=style.QUIET, linewidth=0.8, linestyle="dotted")
    for key, dashes in (("lost", "solid"), ("won", "dashed")):
        found = [math.nan if (share := getattr(test, key)) is None else 100 * share for test in tests]
        right.plot(tokens, found, color=colour, linestyle=dashes, marker=marker, markersize=5)


def _labels(lines: Sequence[Line]) -> dict[TaskKey, str]:
    return task_labels(key for line in lines for key in tests_of(line.run))


def describe_abilities(lines: Sequence[Line]) -> str:
    """Alternative text of ``draw_abilities``."""
    told, labels = [], _labels(lines)
    for line in lines:
        for key, found in tests_of(line.run).items():
            told.append(f"{line.label} on {labels[key]}: {100 * found[0].accuracy:.1f} % to {100 * found[-1].accuracy:.1f} %")
    return "Line charts of accuracy, and of items lost and won, against tokens. " + "; ".join(told) + "."
