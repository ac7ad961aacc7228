"""The figure of training: loss of the training batches, gradient norm and throughput against tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from megarewarm.record.run import RecordedRun
from megarewarm.report.figures import style
from megarewarm.report.figures.curves import legend_above, legend_columns, token_axis
from megarewarm.report.figures.lines import Line
from megarewarm.spelling import tokens_text

_PANELS = (("loss", "Training loss"), ("grad_norm", "Gradient norm"), ("tokens_per_second", "Throughput (tokens/s)"))
_POINTS = 500  # most single steps drawn of each run
_EARLY = 0.05  # of a run from scratch: its loss falls so fast there that it would leave no room for the rest

Points = tuple[NDArray[np.float64], NDArray[np.float64]]


def medians(run: RecordedRun, column: str) -> Points:
    """Tokens and medians over 20 to 100 intervals, of 10 steps or more in a long run, because single steps are noisy.

    The tokens are those in the middle of an interval.
    """
    tokens, values = steps_of(run, column)
    parts = [part for part in np.array_split(np.arange(len(values)), min(100, max(20, len(values) // 10))) if len(part)]
    return np.array([tokens[part].mean() for part in parts]), np.array([np.median(values[part]) for part in parts])


def steps_of(run: RecordedRun, column: str) -> Points:
    """Tokens and a ``column`` of the train lines for every step with a finite value."""
    kept = np.isfinite(run.train[column])
    return run.train["tokens"][kept] - run.tokens_before, run.train[column][kept]


def draw_training(lines: Sequence[Line]) -> Figure | None:
    """A panel for each of the three quantities that some run has: medians as lines, single steps faintly behind them.

    ``None`` if no run has more than one step.
    """
    panels = [(column, title) for column, title in _PANELS if any(len(steps_of(line.run, column)[0]) > 1 for line in lines)]
    if not panels:
        return None
    head = 0.25 + (0.05 + 0.21 * -(-len(lines) // legend_columns(lines))) * (len(lines) > 1)
    height = head + 3.2
    with style.style():
        figure = style.new_figure(11.0, height)
        for place, (column, title) in enumerate(panels):
            axes = figure.add_axes((0.055 + place * 0.33, 0.5 / height, 0.265, 2.45 / height))
            for line in lines:
                tokens, values = steps_of(line.run, column)
                some = np.unique(np.linspace(0, len(tokens) - 1, min(len(tokens), _POINTS)).round().astype(np.int64))
                axes.plot(tokens[some], values[some], color=line.colour, alpha=0.22, linewidth=0.7)
                axes.plot(*medians(line.run, column), color=line.colour, linestyle=line.dashes, linewidth=1.6)
            _limit(axes, lines, column)
            axes.set_title(title)
            axes.set_xlim(0, max(line.run.tokens for line in lines) or 1)
            token_axis(axes)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
            spelt = tokens_text if column == "tokens_per_second" else "{:.3g}".format
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _, spelt=spelt: spelt(value)))
        if len(lines) > 1:
            legend_above(figure, lines)
        return figure


def _limit(axes: Axes, lines: Sequence[Line], column: str) -> None:
    """Show the medians, and all single steps but the most extreme hundredth."""
    shown: list[NDArray[np.float64]] = []
    for line in lines:
        begin = 0.0 if line.run.origin else _EARLY * line.run.tokens
        tokens, values = steps_of(line.run, column)
        if len(late := values[tokens >= begin]):
            shown.append(np.percentile(late, (1, 99)))
        tokens, values = medians(line.run, column)
        shown.append(values[tokens >= begin])
    told = np.concatenate(shown)
    if len(told):
        low, high = float(told.min()), float(told.max())
        least = 0.02 * max(abs(low), abs(high)) or 0.02
        bottom, top = style.limits(low, high, least)
        if column == "loss":  # 0 is no useful reference
            bottom = low - 0.06 * max(high - low, least)
        axes.set_ylim(max(0.0, bottom) if low >= 0 else bottom, top)


def describe_training(lines: Sequence[Line]) -> str:
    """Alternative text of ``draw_training``: the medians at each run's end."""
    ends = []
    for line in lines:
        found = [(title, medians(line.run, column)[1]) for column, title in _PANELS]
        told = [f"{title.lower()} {tokens_text(v[-1]) if v[-1] > 1e3 else f'{v[-1]:.3g}'}" for title, v in found if len(v)]
        ends.append(f"{line.label}: {', '.join(told)}")
    return f"Line charts of training loss, gradient norm and throughput against tokens; at the end: {'; '.join(ends)}."


CAPTION = (
    "Lines: medians over intervals of a run; faint: single steps, except the most extreme hundredth. Throughput is that of "
    "the steps alone, without evaluations and saves."
)
