"""A curve in the terminal, in braille dots or in ASCII."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from megarewarm.spelling import rate_text, tokens_text

# Bits of the 2 x 4 dots of a braille character, [row][column]; U+2800 is the empty one.
_BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def draw_curve(
    xs: ArrayLike,
    ys: ArrayLike,
    width: int = 72,
    height: int = 12,
    *,
    x_label: str = "step",
    y_label: str = "",
    x_text: Callable[[float], str] = tokens_text,
    y_text: Callable[[float], str] = rate_text,
    unicode: bool = True,
) -> str:
    """A line chart of ``ys`` over ascending ``xs`` as text, ``width`` characters wide and at most ``height`` rows high.

    The y axis starts at 0, or lower if the values do. ``y_label`` is above it; ``x_text`` and ``y_text`` format the numbers on
    the axes. Without ``unicode`` only ASCII is used, for terminals that show nothing else. Raises ValueError for fewer than two
    finite points, or for a size too small to hold the axes.
    """
    x, y = np.asarray(xs, dtype=np.float64).ravel(), np.asarray(ys, dtype=np.float64).ravel()
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(x) < 2 or x[-1] <= x[0]:
        raise ValueError("a curve needs two points with different, finite positions")
    low, high = min(0.0, float(y.min())), max(0.0, float(y.max()))
    high = high if high > low else low + 1.0
    lines = height - 2 - bool(y_label)
    lines -= 1 - lines % 2  # an odd number has a middle row for the middle tick
    margin = max(len(y_text(value)) for value in (low, (low + high) / 2, high))
    columns = width - margin - 2
    if lines < 3 or columns < 16:
        raise ValueError(f"{width} x {height} characters are too few for a curve with axes")
    across, down = (2, 4) if unicode else (1, 1)
    dots = _dots(x, (y - low) / (high - low), columns * across, lines * down)
    axis = "│" if unicode else "|"
    text = [f"{'':{margin}}  {y_label}"] if y_label else []
    marks = {0: y_text(high), lines // 2: y_text((low + high) / 2), lines - 1: y_text(low)}
    for line in range(lines):
        cells = dots[line * down : (line + 1) * down].reshape(down, columns, across)
        row = "".join(_character(cells[:, column], unicode) for column in range(columns))
        tick = ("┤" if unicode else "+") if line in marks else axis
        text.append(f"{marks.get(line, ''):>{margin}} {tick}{row}".rstrip())
    rule = "─" if unicode else "-"
    text.append(f"{'':{margin}} {'└' if unicode else '+'}{rule * columns}")
    first, last = x_text(float(x[0])), x_text(float(x[-1]))
    middle = f"{x_label}".center(max(0, columns - len(first) - len(last)))
    text.append(f"{'':{margin}}  {first}{middle}{last}".rstrip())
    return "\n".join(text)


def _dots(x: np.ndarray, heights: np.ndarray, columns: int, lines: int) -> np.ndarray:
    """(lines, columns) bool, first line on top: the curve, joined up where it is steep. ``heights`` lie in [0, 1]."""
    grid = np.zeros((lines, columns), dtype=bool)
    position = (x - x[0]) / (x[-1] - x[0]) * (columns - 1)
    # Every point is kept, so that a peak between two columns is not lost, and the columns between points are filled.
    places = np.unique(np.concatenate([position, np.arange(columns, dtype=np.float64)]))
    levels = np.round(np.interp(places, position, heights) * (lines - 1)).astype(int)
    cells = np.minimum(np.round(places).astype(int), columns - 1)
    for cell, level, before in zip(cells, levels, np.concatenate([levels[:1], levels[:-1]]), strict=True):
        bottom, top = sorted((int(level), int(before)))
        grid[lines - 1 - top : lines - bottom, cell] = True
    return grid


def _character(cell: np.ndarray, unicode: bool) -> str:
    if not unicode:
        return "*" if cell.any() else " "
    bits = sum(_BRAILLE[row][column] for row in range(4) for column in range(2) if cell[row, column])
    return chr(0x2800 + bits) if bits else " "
