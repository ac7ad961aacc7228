"""The figure of forgetting against adaptation over arms, with the arms that no other beats in both."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megarewarm.report.figures import style
from megarewarm.report.figures.labels import place_labels
from megarewarm.report.figures.sweeps import error_bars
from megarewarm.report.figures.tradeoff import signed_ticks
from megarewarm.report.numbers.arms import ArmRow
from megarewarm.report.numbers.runs import same_length
from megarewarm.report.numbers.seeds import Spread
from megarewarm.spelling import signed_text

_LABELLED = 18  # with more arms only the front and the reference arm are named


def comparable(rows: Sequence[ArmRow]) -> list[list[ArmRow]]:
    """The arms with comparable forgetting and adaptation: same validation sets, same start, same number of tokens.

    Only arms with both numbers; an arm with a diverged seed is not judged by its other seeds. Stages of chains, which start
    from each other, are omitted, as are groups of one.
    """
    found: list[list[ArmRow]] = []
    for row in rows:
        if row.arm.chain is not None or row.mean("forgetting") is None or row.mean("adaptation") is None:
            continue
        if any(row.spread(f"{role}_after").others for role in ("upstream", "downstream")):
            continue
        like = [group for group in found if _alike(group[0], row)]
        if like:
            like[0].append(row)
        else:
            found.append([row])
    return [group for group in found if len(group) > 1]


def _alike(one: ArmRow, other: ArmRow) -> bool:
    lengths = (one.mean("tokens") or 0.0, other.mean("tokens") or 0.0)
    return one.arm.sets == other.arm.sets and one.arm.start == other.arm.start and same_length(*lengths)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (forgetting, adaptation) that no other beats, by rising forgetting.

    A point is beaten by one that forgets no more and adapts no less, and is better in one of the two; of equal points the
    first counts.
    """
    kept: list[int] = []
    best = -np.inf
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if points[index][1] > best:
            kept.append(index)
            best = points[index][1]
    return kept


def draw_pareto(rows: Sequence[ArmRow], main: str | None) -> Figure:
    """Means over the seeds, their ranges as bars, and the front as steps. ``main`` is drawn black.

    Colour and marker identify the sweep.
    """
    spreads = [(row.spread("forgetting"), row.spread("adaptation")) for row in rows]
    xs = np.array([x.mean for x, _ in spreads], dtype=np.float64)
    ys = np.array([y.mean for _, y in spreads], dtype=np.float64)
    best = front(list(zip(xs.tolist(), ys.tolist(), strict=True)))
    groups = list(dict.fromkeys(row.arm.group or "" for row in rows if row.name != main))
    with style.style():
        figure = style.new_figure(9.4, 6.2)
        axes = figure.add_axes((0.09, 0.1, 0.885, 0.79))
        for side, values, index in ((axes.set_xlim, xs, 0), (axes.set_ylim, ys, 1)):
            bars = error_bars([pair[index] for pair in spreads])
            side(*style.limits(float((values - bars[0]).min()), float((values + bars[1]).max())))
        zero = [
            side(0, color=style.QUIET, linewidth=0.8)
            for side, (low, high) in ((axes.axhline, axes.get_ylim()), (axes.axvline, axes.get_xlim()))
            if low < 0 < high
        ]
        if len(best) > 1:
            axes.step(xs[best], ys[best], where="post", color=style.QUIET, linewidth=1.2, linestyle=(0, (5, 2)), zorder=1.6,
                      label="front: no arm is better in both")  # fmt: skip
        colours: list[str] = []
        told: set[str] = set()
        for row, x, y, pair in zip(rows, xs, ys, spreads, strict=True):
            group = row.arm.group or ""
            place = style.BLACK if row.name == main else style.place_beside_black(groups.index(group))
            colours.append(style.colour(place))
            name = row.name if row.name == main else group or "single arms"
            axes.errorbar(
                [x], [y], xerr=error_bars([pair[0]]), yerr=error_bars([pair[1]]), color=colours[-1], elinewidth=1.0,
                marker=style.marker(place), markersize=8, markeredgecolor="white", zorder=3, linestyle="none",
                label=None if name in told else name,
            )  # fmt: skip
            told.add(name)
        axes.set_xlabel(f"forgetting: rise of the upstream loss ({rows[0].arm.unit})")
        axes.set_ylabel(f"adaptation: fall of the downstream loss ({rows[0].arm.unit})")
        signed_ticks(axes)
        style.quiet_axes(axes)
        handles, names = axes.get_legend_handles_labels()
        figure.legend(
            handles, names, loc="upper left", bbox_to_anchor=(0.08, 1), ncols=6, frameon=False, fontsize=9, columnspacing=1.4
        )
        corner = axes.text(0.012, 0.985, "↖ better", transform=axes.transAxes, color=style.QUIET, va="top")
        named = [i for i, row in enumerate(rows) if len(rows) <= _LABELLED or i in best or row.name == main]
        place_labels(
            axes, xs[named], ys[named], [rows[i].name for i in named], [style.for_text(colours[i]) for i in named],
            taken=[corner, *zero],
            points=np.vstack([np.column_stack([xs, ys]), _steps(xs[best], ys[best]), *map(_bars, spreads)]),
        )  # fmt: skip
        return figure


def _steps(xs: NDArray[np.float64], ys: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points along the steps between (``xs``, ``ys``), (n, 2), so that labels avoid the line."""
    corners = np.column_stack([np.repeat(xs, 2)[1:], np.repeat(ys, 2)[:-1]])
    along = np.linspace(0, 1, 30)[:, None]
    return np.vstack([np.empty((0, 2)), *(a + along * (b - a) for a, b in itertools.pairwise(corners))])


def _bars(pair: tuple[Spread, Spread]) -> NDArray[np.float64]:
    """Points along an arm's two bars, (n, 2)."""
    x, y = pair
    along_x, along_y = np.linspace(x.low or 0, x.high or 0, 15), np.linspace(y.low or 0, y.high or 0, 15)
    across = [np.full(15, spread.mean) for spread in pair]
    return np.vstack([np.column_stack([along_x, across[1]]), np.column_stack([across[0], along_y])])


def describe_pareto(rows: Sequence[ArmRow]) -> str:
    """Alternative text of ``draw_pareto``."""
    points = [
        f"{row.name}: forgetting {signed_text(row.mean('forgetting'))}, adaptation {signed_text(row.mean('adaptation'))}"
        for row in rows
    ]
    return f"Scatter chart of adaptation against forgetting. {'; '.join(points)}."
