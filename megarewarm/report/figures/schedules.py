"""One picture of every learning-rate curve, drawn from the functions that training uses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from megarewarm.config.schedule import ScheduleConfig, build_schedule
from megarewarm.report.figures import style
from megarewarm.schedules.curves import WSD_DECAYS
from megarewarm.schedules.schedule import CURVES, Schedule

_STEPS, _COLUMNS = 1000, 3
_PEAK = {"max_lr": 1.0, "warmup": "5%"}


def draw_gallery(path: Path) -> None:
    """Write a PNG with one panel per curve, one for the first steps, and one that compares the two cosines."""
    with style.style():
        rows = math.ceil((len(CURVES) + 2) / _COLUMNS)
        figure = style.new_figure(11, 2.875 * rows)
        panels = list(figure.subplots(rows, _COLUMNS).flat)
        figure.subplots_adjust(left=0.065, right=0.97, top=0.965, bottom=0.05, hspace=0.42, wspace=0.24)
        for name in CURVES:
            _curve(panels.pop(0), name)
        _two_cosines(panels.pop(0))
        _first_steps(panels.pop(0))
        for axes in panels:
            axes.set_axis_off()
        figure.savefig(path, dpi=110)


def _build(**keys: Any) -> Schedule:
    config = ScheduleConfig.model_validate(keys)
    return build_schedule(config, lambda budget: budget.in_steps(1, _STEPS), _STEPS)


def _curve(axes: Axes, name: str) -> None:
    curve = CURVES[name]
    n = np.arange(_STEPS + 1)
    shapes = list(WSD_DECAYS) if "decay_shape" in curve.may else [None]
    for index, shape in enumerate(shapes):
        schedule = _build(curve=name, **_PEAK, **curve.example, **({"decay_shape": shape} if shape else {}))
        axes.plot(n / _STEPS, schedule.values(n), color=style.colour(index), label=shape)
    if len(shapes) > 1:
        shared = n[n <= schedule.length - (schedule.decay or 0)]
        axes.plot(shared / _STEPS, schedule.values(shared), color=style.QUIET)  # what all the shapes have in common
        axes.legend(title="decay_shape", loc="lower left", bbox_to_anchor=(0.06, 0.1), frameon=False, fontsize=8.5)
    for phase, start, stop in schedule.phases():
        stop = min(stop, _STEPS)
        if phase != "warmup" and stop - start >= 150:
            axes.text((start + stop) / 2 / _STEPS, 1.05, phase, ha="center", va="bottom", fontsize=8.5, color=style.QUIET)
        if start > 0 and start < _STEPS:
            axes.axvline(start / _STEPS, color=style.QUIET, linewidth=0.8, linestyle=(0, (1, 2)), ymax=0.9)
    _frame(axes, name)


def _two_cosines(axes: Axes) -> None:
    n = np.arange(_STEPS + 1)
    for index, (curve, x, y, side) in enumerate((("cosine", 0.57, 0.57, "left"), ("cosine_clipped", 0.42, 0.40, "right"))):
        values = _build(curve=curve, max_lr=1.0, min_lr=0.1, warmup="1%").values(n)
        axes.plot(n / _STEPS, values, color=style.colour(index))
        axes.text(x, y, curve, color=style.colour(index), ha=side)
    axes.annotate(
        "floor at 80.5%", (0.8052, 0.1), (0.8052, 0.36), ha="center", fontsize=8.5, color=style.QUIET,
        arrowprops={"arrowstyle": "-", "color": style.QUIET, "linewidth": 0.8},
    )  # fmt: skip
    _frame(axes, "the two cosines, warmup 1%")


def _first_steps(axes: Axes) -> None:
    n = np.arange(13)
    schedule = _build(curve="cosine", max_lr=1.0, min_lr=0.1, warmup=10)
    axes.plot(n + 1, schedule.values(n), "o-", color=style.colour(0), markersize=4.5)
    axes.annotate(
        "the first two steps\nshare max_lr / W", (1.5, 0.115), (3.4, 0.09), fontsize=8.5, va="center",
        color=style.QUIET, arrowprops={"arrowstyle": "-", "color": style.QUIET, "linewidth": 0.8},
    )  # fmt: skip
    _frame(axes, "first steps, warmup W = 10 steps", x_label="step, counted from 1")
    axes.set_xlim(0.4, 13.6)
    axes.set_xticks([1, 2, 4, 6, 8, 10, 12])


def _frame(axes: Axes, title: str, x_label: str = "") -> None:
    axes.set_title(title, fontfamily="DejaVu Sans Mono" if title in CURVES else None)
    axes.set_xlabel(x_label or "share of the run")
    axes.set_ylim(0, 1.15)
    axes.set_yticks([0.1, 0.5, 1], ["min", "max/2", "max"])
    if not x_label:
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1], ["0", "20%", "40%", "60%", "80%", "100%"])
    style.quiet_axes(axes)
