"""The figure of values: what each source's rows did to each validation loss, and whether steps did what was predicted."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megarewarm.record.run import RecordedRun
from megarewarm.report.figures import style
from megarewarm.report.figures.curves import token_axis
from megarewarm.report.numbers.values import Prediction, predictions, sums_by_source
from megarewarm.spelling import MINUS, listed

_WIDTH, _ROW, _MOST = 11.0, 3.1, 6  # inches; runs in one figure
CAPTION = (
    "Left: the values of the rows that were valued, summed by source; positive lowered the loss of the set in the heading. "
    "Right: by how much each valued step was to lower the loss, and did, on the same rows."
)


def draw_values(runs: Sequence[tuple[str, RecordedRun]]) -> Figure | None:
    """A row for each of the first runs with valued rows, by their labels: a panel for each validation set with a line for each
    source, and one of predicted and measured changes. None if no run valued rows."""
    valued = [(label, run, found) for label, run in runs if (found := predictions(run))][:_MOST]
    if not valued:
        return None
    columns = 1 + max(len(found) for _, _, found in valued)
    sources = list(dict.fromkeys(s for _, run, found in valued for name in found for s in sums_by_source(run, name)))
    lines = -(-len(sources) // 6)
    head = 0.5 + 0.22 * lines
    height = head + _ROW * len(valued)
    with style.style():
        figure = style.new_figure(_WIDTH, height)
        panels = figure.subplots(len(valued), columns, squeeze=False)
        figure.subplots_adjust(
            left=0.085, right=0.985, top=1 - head / height, bottom=0.55 / height, hspace=0.5, wspace=0.38
        )  # fmt: skip
        for row, (label, run, found) in zip(panels, valued, strict=True):
            title = f"{label}: " if len(valued) > 1 else ""
            for axes, name in zip(row, found, strict=False):
                _draw_sums(axes, run, name, sources)
                axes.set_title(f"{title}{name}")
            for axes in row[len(found) : -1]:
                axes.set_visible(False)
            _draw_predictions(row[-1], found)
        handles = [figure.gca().plot([], [], color=style.colour(i), linestyle=style.dashes(i))[0] for i in range(len(sources))]
        figure.legend(handles, sources, loc="upper left", bbox_to_anchor=(0.075, 1), ncols=6, frameon=False)
        return figure


def _draw_sums(axes: Axes, run: RecordedRun, name: str, sources: Sequence[str]) -> None:
    axes.axhline(0, color=style.QUIET, linewidth=0.8)
    for source, (tokens, sums) in sums_by_source(run, name).items():
        place = sources.index(source)
        axes.plot(tokens, sums, color=style.colour(place), linestyle=style.dashes(place), marker="." if len(sums) < 20 else "")
    axes.set_ylabel("summed value (nats/token)")
    axes.set_xlim(0, run.tokens or 1)
    token_axis(axes)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=4))


def _draw_predictions(axes: Axes, found: dict[str, Prediction]) -> None:
    for place, (name, pair) in enumerate(found.items()):
        told = "" if pair.r_squared is None else f", R² {_plain(pair.r_squared)}"
        axes.scatter(
            pair.predicted, pair.measured, s=14, alpha=0.7, linewidths=0, color=style.INK if not place else style.QUIET,
            marker=style.marker(place), label=f"{name}{told}",
        )  # fmt: skip
    low = min(min(axes.get_xlim()[0], axes.get_ylim()[0]), 0)
    high = max(axes.get_xlim()[1], axes.get_ylim()[1])
    axes.plot([low, high], [low, high], color=style.QUIET, linewidth=0.8, linestyle="dashed", zorder=1)
    axes.set_title("Predicted and measured")
    axes.set_xlabel("predicted fall of the loss")
    axes.set_ylabel("measured")
    axes.legend(loc="upper left", fontsize=8, frameon=False, handletextpad=0.1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=4))


def _plain(number: float) -> str:
    return f"{number:.3f}".replace("-", MINUS)


def describe_values(runs: Sequence[tuple[str, RecordedRun]]) -> str:
    """Alternative text of ``draw_values``: the last sums, and how well steps were predicted."""
    told = []
    for label, run in runs:
        for name, pair in list(predictions(run).items()):
            ends = [f"{source} {sums[-1]:+.3g}" for source, (_, sums) in sums_by_source(run, name).items()]
            trust = "" if pair.r_squared is None else f", R squared {pair.r_squared:.3f}"
            told.append(f"{label} against {name}: {listed(ends)}{trust}")
    return f"Line charts of summed values of the training sources against tokens; at the end: {'; '.join(told)}."
