"""The figure of losses by position: whether a model uses the context that it is given."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megarewarm.record.lines import Evaluation
from megarewarm.record.run import RecordedRun
from megarewarm.report.figures import style
from megarewarm.report.figures.curves import legend_above, legend_columns
from megarewarm.report.figures.lines import Line
from megarewarm.spelling import loss_text

CAPTION = (
    "Mean loss of the tokens at each distance from the beginning of their window, in nats per token. Solid: after the run; "
    "dashed: the start checkpoint. A line that rises at its end shows positions that the model can't use."
)


def draw_positions(lines: Sequence[Line]) -> Figure | None:
    """One panel for each validation set that was measured by position; ``None`` without any."""
    lines = [line for line in lines if any(found.by_position for found in line.run.evaluations)]
    sets = list(dict.fromkeys((e.role, e.name) for line in lines for e in line.run.evaluations if e.by_position))
    if not sets:
        return None
    with style.style():
        down = math.ceil(len(sets) / 2)
        head = 0.55 + 0.21 * math.ceil(len(lines) / legend_columns(lines))
        total = head + 2.9 * down
        figure = style.new_figure(11.0, total)
        panels = list(figure.subplots(down, min(2, len(sets)), squeeze=False).flat)
        figure.subplots_adjust(left=0.075, right=0.985, top=1 - head / total, bottom=0.6 / total, hspace=0.5, wspace=0.18)
        for axes in panels[len(sets) :]:
            axes.set_visible(False)
        for axes, (role, name) in zip(panels, sets, strict=False):
            _draw_set(axes, lines, name)
            axes.set_title(name if role == "other" else f"{name} ({role})")
        legend_above(figure, lines)
        return figure


def _draw_set(axes: Axes, lines: Sequence[Line], name: str) -> None:
    firsts: set[int] = set()
    for line in lines:
        start, end = ends_of(line.run, name)
        for found, dashes in ((start, (0, (4, 3))), (end, "solid")):
            if found is None:
                continue
            firsts |= {first for first, _ in found.by_position}
            # the first distance begins at 0, which a logarithm has no place for
            least = found.by_position[1][0] / 2 if len(found.by_position) > 1 else 1
            places = [max(first, least) for first, _ in found.by_position]
            losses = [loss for _, loss in found.by_position]
            axes.plot(places, losses, color=line.colour, linestyle=dashes, marker=line.marker, markersize=5)
    ticks = sorted(firsts)
    axes.set_xscale("log", base=2)
    axes.set_xticks([max(first, ticks[1] / 2 if len(ticks) > 1 else 1) for first in ticks], [f"{first:,}" for first in ticks])
    axes.minorticks_off()
    axes.set_xlabel("position in the window, from")
    style.quiet_axes(axes)


def ends_of(run: RecordedRun, name: str) -> tuple[Evaluation | None, Evaluation | None]:
    """The evaluations of a set by position: of the start checkpoint, where there was one, and the last."""
    found = [each for each in run.evaluations if each.name == name and each.by_position]
    start = found[0] if found and run.origin and found[0].step == run.first_step else None
    return start, found[-1] if found and found[-1] is not start else None


def describe_positions(lines: Sequence[Line]) -> str:
    """Alternative text of ``draw_positions``."""
    told = []
    for line in lines:
        for name in dict.fromkeys(each.name for each in line.run.evaluations if each.by_position):
            if (end := ends_of(line.run, name)[1]) is not None:
                first, last = end.by_position[0], end.by_position[-1]
                span = f"{loss_text(first[1])} from position {first[0]:,}, {loss_text(last[1])} from {last[0]:,}"
                told.append(f"{line.label} on {name}: {span}")
    return "Line charts of loss against position in the window. " + "; ".join(told) + "."
