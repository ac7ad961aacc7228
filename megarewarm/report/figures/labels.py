"""Placement of labels: they overlap neither each other nor what they name."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from megarewarm.report.figures import style

# Positions of a label, best first: sideways by (half widths, distances), upwards by (half heights and distances).
_DIRECTIONS = [
    (1.0, 1.0, 0), (-1.0, -1.0, 0), (1.0, 0.75, 1), (1.0, 0.75, -1), (-1.0, -0.75, 1), (-1.0, -0.75, -1),
    (0.0, 0.0, 1), (0.0, 0.0, -1), (0.9, 0.0, 1), (0.9, 0.0, -1), (-0.9, 0.0, 1), (-0.9, 0.0, -1),
]  # fmt: skip
_DISTANCES = (9, 20, 34, 52, 74)  # points
_FONT = 9.5


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places at least ``gap`` apart, in the order of ``wanted`` (ascending), with the least sum of squared moves.

    The places lie in [0, 1], or start at 0 if there is not enough room. Isotonic regression of wanted[i] - i * gap by pooling
    adjacent violators, clipped to the bounds.
    """
    blocks: list[tuple[float, int]] = []
    for index, value in enumerate(wanted):
        block = (value - index * gap, 1)
        while blocks and blocks[-1][0] / blocks[-1][1] > block[0] / block[1]:
            total, count = blocks.pop()
            block = (total + block[0], count + block[1])
        blocks.append(block)
    means = itertools.chain.from_iterable([total / count] * count for total, count in blocks)
    highest = 1 - (len(wanted) - 1) * gap
    return [max(0.0, min(mean, highest)) + index * gap for index, mean in enumerate(means)]


def place_labels(
    axes: Axes,
    xs: NDArray[np.float64],
    ys: NDArray[np.float64],
    texts: Sequence[str],
    colours: Sequence[str],
    taken: Sequence[Any] = (),
    points: NDArray[np.float64] | None = None,
    font: float = _FONT,
) -> None:
    """Write ``texts`` beside the points (``xs``, ``ys``), which are in data units, each at the position where it covers least.

    ``taken`` are artists to avoid, ``points`` (n, 2) all points of the picture, in data units, if some have no label. A
    hairline joins a label to a distant point. ``font`` is in points.
    """
    renderer = axes.figure.canvas.get_renderer()  # type: ignore[attr-defined]
    scale = axes.figure.dpi / 72
    marked = axes.transData.transform(np.column_stack([xs, ys]) if points is None else points)
    points = axes.transData.transform(np.column_stack([xs, ys]))
    inside = axes.get_window_extent(renderer)
    obstacles = [Bbox.from_bounds(x - 6 * scale, y - 6 * scale, 12 * scale, 12 * scale) for x, y in marked]
    obstacles += [artist.get_window_extent(renderer).padded(3) for artist in taken]
    dots = [Bbox.from_bounds(x - 4 * scale, y - 4 * scale, 8 * scale, 8 * scale) for x, y in points]
    labels: list[Bbox] = []
    for index in np.argsort(-points[:, 1], kind="stable"):
        x, y = points[index]
        others = [dot for number, dot in enumerate(dots) if number != index and not dot.contains(x, y)]
        label = axes.text(0, 0, texts[index], fontsize=font)
        size = label.get_window_extent(renderer)
        label.remove()
        best: tuple[float, float, float, Bbox] | None = None
        for distance, (widths, distances, up) in itertools.product(_DISTANCES, _DIRECTIONS):
            length = distance * scale
            cx = x + widths * size.width / 2 + distances * length
            cy = y + up * (length * (0.75 if distances else 1) + size.height / 2)
            text = Bbox.from_bounds(cx - size.width / 2, cy - size.height / 2, size.width, size.height)
            box = text.padded(2 * scale)
            areas = [_overlap(box, other) for other in obstacles]
            outside = box.width * box.height - _overlap(box, inside)
            end = float(np.clip(x, text.x0, text.x1)), float(np.clip(y, text.y0, text.y1))
            crossed = sum(_crosses((x, y), end, other) for other in [*labels, *others]) if distance > _DISTANCES[0] else 0
            cost = 10 * (sum(areas) + outside) + 1500 * np.count_nonzero(areas) + 4000 * crossed + 8 * length
            if best is None or cost < best[0]:
                best = (cost, (cx - x) / scale, (cy - y) / scale, text)
        assert best is not None
        _, dx, dy, text = best
        obstacles.append(text.padded(2 * scale))
        labels.append(obstacles[-1])
        nearest = np.clip(x, text.x0, text.x1), np.clip(y, text.y0, text.y1)
        joined = {
            "arrowstyle": "-", "color": style.QUIET, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 6,
            "relpos": ((nearest[0] - text.x0) / text.width, (nearest[1] - text.y0) / text.height),
        }  # fmt: skip
        far = np.hypot(nearest[0] - x, nearest[1] - y) > 12 * scale
        axes.annotate(
            texts[index], (xs[index], ys[index]), xytext=(dx, dy), textcoords="offset points", fontsize=font,
            color=colours[index], ha="center", va="center", zorder=4, arrowprops=joined if far else None,
        )  # fmt: skip


def _crosses(start: tuple[float, float], end: tuple[float, float], box: Bbox) -> bool:
    """Whether the line between two points runs through ``box``."""
    return any(
        box.contains(start[0] + (end[0] - start[0]) * t, start[1] + (end[1] - start[1]) * t) for t in np.linspace(0, 1, 25)
    )


def _overlap(a: Bbox, b: Bbox) -> float:
    """Area in square pixels that two boxes share."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(0.0, width) * max(0.0, height)
