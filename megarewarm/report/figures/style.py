"""The common look of all figures: light, quiet, readable in print and with colour-vision deficiencies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import matplotlib.colors
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

INK = "#1f2328"
QUIET = "#5c6570"
GRID = "#e4e7eb"

# Okabe and Ito's palette, which stays distinct under every common colour-vision deficiency, without its yellow, which
# is too faint for lines on white; orange and sky blue are darkened a little for the same reason.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b65a94", "#1f2328", "#c98a00", "#3d9fd6", "#7f6b5d")
BLACK = 4  # its index
# A second cue beside the colour, and the only one in a black-and-white print.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")

_EMPTY = 2.0  # times the values' own range: the furthest 0 on an axis
_SEQUENCES = (("plasma", 0.0, 0.78), ("viridis", 0.2, 0.78))  # the rest is too faint for lines on white

_SETTINGS: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "path",  # embeds letters as paths, so that it looks the same without the font
    "svg.hashsalt": "megarewarm",  # the same data give the same file
}


@contextmanager
def style() -> Iterator[None]:
    """Gives everything drawn inside the ``with`` block the project's look, and changes nothing outside it."""
    with matplotlib.rc_context(_SETTINGS):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of the given size in inches, drawn without a display and without pyplot's global state."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def colour(index: int) -> str:
    """Colour of the ``index``-th run; colours repeat after eight, and dashes and markers distinguish the repetitions."""
    return COLOURS[index % len(COLOURS)]


def place_beside_black(index: int) -> int:
    """Index in the palette of the ``index``-th colour that is not ``BLACK``, which is for the reference arm."""
    others = len(COLOURS) - 1
    place = index % others
    return place + (place >= BLACK) + len(COLOURS) * (index // others)


def for_text(colour: str) -> str:
    """``colour``, darkened until text of it has a contrast of 4.5 to 1 against white (WCAG 2.2, level AA)."""
    rgb = np.array(matplotlib.colors.to_rgb(colour), dtype=np.float64)
    while 1.05 / (_luminance(rgb) + 0.05) < 4.5:
        rgb *= 0.97
    return matplotlib.colors.to_hex((float(rgb[0]), float(rgb[1]), float(rgb[2])))


def _luminance(rgb: NDArray[np.float64]) -> float:
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ np.array([0.2126, 0.7152, 0.0722]))


def marker(index: int) -> str:
    """Marker of the ``index``-th run: shifted by one at every repetition of the colours."""
    return MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]


def dashes(index: int) -> str | tuple[float, tuple[float, ...]]:
    """Line style of the ``index``-th run: solid, until the colours repeat."""
    return ("solid", (0.0, (6.0, 2.0)), (0.0, (1.5, 1.5)))[index // len(COLOURS) % 3]


def limits(low: float, high: float, least: float = 0.02) -> tuple[float, float]:
    """Where an axis with values from ``low`` to ``high`` begins and ends: at 0, unless most of it would be empty.

    Values that differ by less than ``least`` are drawn as if they differed by that much.
    """
    span = max(high - low, least)
    if not low <= 0 <= high and min(abs(low), abs(high)) <= _EMPTY * span:
        low, high = min(0.0, low), max(0.0, high)
    pad = 0.12 * max(high - low, least)
    return low - pad, high + pad


def sequence(count: int, axis: int = 0) -> list[str]:
    """``count`` colours for the values of one axis in their order, lighter for higher ones: dark blue over red to orange for
    the first axis of a sweep, dark blue to green for the others."""
    name, first, last = _SEQUENCES[min(axis, 1)]
    places = np.linspace(first, last, count) if count > 1 else [first]
    return [matplotlib.colors.to_hex(matplotlib.colormaps[name](float(place))) for place in places]


def quiet_axes(axes: Axes) -> None:
    """Without tick marks, since the grid is enough."""
    axes.tick_params(length=0)
