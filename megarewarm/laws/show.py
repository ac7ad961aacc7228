"""Advice for people: in the terminal, and as a picture of what was predicted against what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from megarewarm.laws.advice import Advice, Prediction, Section
from megarewarm.laws.fitting import Trial
from megarewarm.report import style
from megarewarm.report.lines import short_labels
from megarewarm.report.place import place_labels
from megarewarm.report.read import UPSTREAM
from megarewarm.report.words import loss_text, rate_text

FORMS = {
    "schedule": "L(t) = L(0) + A ((S0 + S1)^-a - S0^-a) - C S2 + B (1 - (1 + E S1)^-b)  (2408.11029; 2505.07796, second-hand)",
    "replay": "L(D, r) = E + B r^n / D^b + C / (r + e)^g   (D-CPT law, 2406.01375)",
}
_NAMED = 12  # arms whose names a picture has room for
_NAME_FONT = 7.0  # points
_BEST = 8  # predictions that the terminal shows of a grid


def print_advice(advice: Advice, console: Console) -> None:
    """Everything but the whole grid, which advice.json has."""
    console.print(f"[bold]{advice.title}[/]", highlight=False)
    for note in advice.notes:
        console.print(f"  {note}", style="dim", highlight=False)
    fitted = [section for section in advice.sections if section.laws]
    for section in fitted:
        console.print()
        console.print(f"[bold]{section.kind}[/] · {', '.join(section.family.arms)}", highlight=False)
        console.print(FORMS[section.kind], style="dim", highlight=False)
        console.print(_held_out(section))
        console.print(_predicted(section, advice.within))
        for sentence in section.sentences:
            console.print(f"- {sentence}", highlight=False)
    for section in advice.sections:
        if not section.laws:
            arms = ", ".join(section.family.arms)
            console.print(f"{section.kind} · {arms}: {'; '.join(section.sentences)}.", style="dim", highlight=False)


def _held_out(section: Section) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", title="left out, then predicted", title_justify="left"
    )
    table.add_column("arm", overflow="fold", min_width=16)
    for role in section.laws:
        for column in (role, "law", "error"):
            table.add_column(column, justify="right", no_wrap=True)
    rows: dict[str, list[str]] = {}
    for law in section.laws.values():
        for arm in law.trial.arms:
            mark = "" if arm.inside else " *"
            cells = [loss_text(arm.measured), loss_text(arm.predicted), f"{arm.error:+.3f}{mark}"]
            rows.setdefault(arm.arm, []).extend(cells)
    for name, cells in rows.items():
        table.add_row(name, *cells)
    if any(not arm.inside for law in section.laws.values() for arm in law.trial.arms):
        table.caption, table.caption_justify = "* lies outside the others: not counted, and nothing is predicted there", "left"
    return table


def _predicted(section: Section, within: float) -> Table:
    """All replay fractions; of a grid of schedules the best within the limit, or by the mean of both losses."""
    title, shown = "predicted final losses", section.predictions
    if section.kind == "schedule" and len(section.laws) == 2:
        limit = section.family.mean_start(UPSTREAM) * (1 + within)
        allowed = [one for one in shown if one.losses[UPSTREAM] <= limit]
        other = next(role for role in section.laws if role != UPSTREAM)
        best = sorted(allowed, key=lambda one: one.losses[other]) or sorted(shown, key=lambda one: one.mean)
        by = f"the best {other} within the limit" if allowed else "the best by the mean of both"
        title = f"predicted final losses of {len(shown)} schedules: {by}, each curve and peak at its best warmup"
        first: dict[tuple[str, float], Prediction] = {}
        for one in best:
            keys = one.keys["schedule"]
            first.setdefault((keys["curve"], keys["max_lr"]), one)
        shown = list(first.values())[:_BEST]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", title=title, title_justify="left")
    table.add_column("", overflow="fold")
    for role, trial in section.trials.items():
        table.add_column(f"{role} ± {trial.band:.3f}", justify="right", no_wrap=True)
    for one in shown:
        table.add_row(one.what, *(loss_text(one.losses[role]) for role in section.laws))
    return table


def draw_advice(advice: Advice, path: Path) -> bool:
    """``advice_figure`` as the PNG at ``path``. Returns whether there was any."""
    figure = advice_figure(advice)
    if figure is None:
        return False
    figure.savefig(path, dpi=130)
    return True


def advice_figure(advice: Advice) -> Figure | None:
    """Per fitted family and loss, held-out arms, and the predictions; None where nothing could be fitted."""
    fitted = [section for section in advice.sections if section.laws]
    if not fitted:
        return None
    columns = max(len(section.laws) for section in fitted)
    figure = style.new_figure(5.2 * columns, 7.6 * len(fitted))
    axes = figure.subplots(2 * len(fitted), columns, squeeze=False)
    for row in axes:
        for axis in row:
            axis.set_visible(False)
    for number, section in enumerate(fitted):
        for column, role in enumerate(section.laws):
            top, bottom = axes[2 * number][column], axes[2 * number + 1][column]
            _draw_held_out(top, section, role)
            _draw_predicted(bottom, section, role)
    figure.suptitle(advice.title, fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    for number, section in enumerate(fitted):  # names go where the frames, which have their places now, leave room
        for column, role in enumerate(section.laws):
            _name_held_out(axes[2 * number][column], section.laws[role].trial)
    return figure


def _draw_held_out(axis: Any, section: Section, role: str) -> None:
    """Predicted against measured final loss of arms that the fit hadn't seen."""
    axis.set_visible(True)
    trial = section.laws[role].trial
    inside = [arm for arm in trial.arms if arm.inside]
    measured, predicted = [arm.measured for arm in inside], [arm.predicted for arm in inside]
    ends = [min(measured + predicted), max(measured + predicted)]
    axis.plot(ends, ends, color="0.6", linewidth=1)
    axis.errorbar(measured, predicted, yerr=trial.band, fmt="o", color="#0072b2", ecolor="#9ecae1", capsize=2)
    axis.margins(x=0.1, y=0.12)
    axis.set_title(f"{section.kind}: {role} loss of arms left out", fontsize=9, loc="left")
    axis.set_xlabel("measured", fontsize=8)
    axis.set_ylabel("predicted, 90 % band", fontsize=8)
    axis.tick_params(labelsize=8)


def _name_held_out(axis: Any, trial: Trial) -> None:
    """The arms' names beside their points; of many arms those of the largest errors."""
    inside = [arm for arm in trial.arms if arm.inside]
    names = dict(zip((arm.arm for arm in inside), short_labels([arm.arm for arm in inside]), strict=True))
    named = sorted(inside, key=lambda arm: -abs(arm.error))[:_NAMED]
    bars = [(arm.measured, arm.predicted + trial.band * share) for arm in inside for share in np.linspace(-1, 1, 9)]
    xs, ys = np.array([(arm.measured, arm.predicted) for arm in named]).T
    place_labels(
        axis, xs, ys, [names[arm.arm] for arm in named], ["black"] * len(named), points=np.array(bars), font=_NAME_FONT
    )


def _draw_predicted(axis: Any, section: Section, role: str) -> None:
    """Final loss against the peak or the replay fraction, with the band; measured arms as crosses."""
    axis.set_visible(True)
    law, family = section.laws[role], section.family
    lines: dict[str, list[tuple[float, float]]] = {}
    for one in section.predictions:
        if section.kind == "replay":
            lines.setdefault("predicted", []).append((one.keys["replay"]["fraction"], one.losses[role]))
        else:
            keys = one.keys["schedule"]
            if keys["warmup"] == _middle_warmup(section):
                lines.setdefault(f"{keys['curve']}, warmup {keys['warmup']}", []).append((keys["max_lr"], one.losses[role]))
    for colour, dash, (label, points) in zip(
        ("#0072b2", "#d55e00", "#009e73", "#cc79a7"), ("-", "--", "-.", ":"), lines.items(), strict=False
    ):
        x, y = zip(*sorted(points), strict=True)
        axis.plot(x, y, dash, color=colour, label=label)
        axis.fill_between(
            x, [v - law.trial.band for v in y], [v + law.trial.band for v in y], color=colour, alpha=0.1, linewidth=0
        )
    at = [float(run.rates.max()) if section.kind == "schedule" else run.replay for run in family.runs]
    axis.plot(at, [run.final(role) for run in family.runs], "x", color="black", label="measured")
    if section.kind == "schedule":
        axis.set_xscale("log")
        axis.minorticks_off()
        peaks = sorted(set(at))
        axis.set_xticks(peaks, [rate_text(peak) for peak in peaks])
    axis.set_xlabel("peak learning rate" if section.kind == "schedule" else "replay fraction", fontsize=8)
    axis.set_ylabel(f"final {role} loss", fontsize=8)
    axis.set_title(f"{section.kind}: predicted {role} loss", fontsize=9, loc="left")
    axis.legend(fontsize=7, frameon=False)
    axis.tick_params(labelsize=8)


def _middle_warmup(section: Section) -> str:
    warmups = list(dict.fromkeys(one.keys["schedule"]["warmup"] for one in section.predictions))
    return str(warmups[len(warmups) // 2])
