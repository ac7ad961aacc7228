"""The arms that are drawn together, and the figures of their runs: losses, chains of stages, dynamics, interpolation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megarewarm.record.run import DOWNSTREAM, UPSTREAM, RecordedRun
from megarewarm.report.figures import style
from megarewarm.report.figures.lines import Line, short_labels
from megarewarm.report.figures.sweeps import axis_colours, ordered_values, value_text, varied_axes
from megarewarm.report.figures.training import Points, medians
from megarewarm.report.numbers.arms import chain_ends, chain_stages, reference_of, whole_runs
from megarewarm.report.numbers.experiment import ArmRecord, ExperimentRecord, joined_run, mean_run
from megarewarm.spelling import listed, tokens_text

_MOST = 9  # most arms in one picture


@dataclasses.dataclass(frozen=True)
class Panel:
    """Arms that are drawn together, the reference arm first. ``key`` is part of a file's name."""

    key: str
    title: str
    arms: list[ArmRecord]


def panels_of(experiment: ExperimentRecord) -> list[Panel]:
    """The arms with something to draw: the single ones, and those of every sweep, each with its reference arm.

    Arms with different validation sets have separate panels. More than nine arms are split into several, whose titles name the
    part. Pre-training is omitted, and chains have their own figure.
    """
    able = [arm for arm in experiment.arms if arm.runs and arm.kind != "pretraining" and arm.chain is None]
    whole = whole_runs(experiment)
    singles = [arm for arm in able if not arm.groups and arm not in whole]
    main = experiment.main
    wanted: list[tuple[str, str, ArmRecord | None, list[ArmRecord]]] = [("single", "Single arms", main, singles)]
    for group in experiment.groups:
        inside = [arm for arm in able if group in arm.groups]
        reference = reference_of(experiment, group)
        axes = dict.fromkeys(axis for arm in inside for axis in arm.groups[group])
        wanted.append((group, f"{group} ({', '.join(axes)})" if axes and [*axes] != [group] else group, reference, inside))
    panels = []
    for key, title, reference, arms in wanted:
        by_sets: dict[tuple[tuple[str, ...], ...], list[ArmRecord]] = {}
        for arm in arms:
            by_sets.setdefault(arm.sets, []).append(arm)
        for number, (sets, same) in enumerate(by_sets.items()):
            shared = [reference] if reference is not None and reference.runs and reference.sets == sets else []
            rest = [arm for arm in same if arm not in shared]
            if not rest:
                continue
            where = f", on {' and '.join(sets[0] + sets[1])}" if len(by_sets) > 1 else ""
            name = f"{key}_{number + 1}" if len(by_sets) > 1 else key
            if len(rest) <= _MOST - len(shared):
                panels.append(Panel(name, f"{title}{where}", [*shared, *rest]))
                continue
            if shared and shared[0].group == key:  # the reference is one of the arms to split
                shared, rest = [], same
            for part, (words, some) in enumerate(_parts(key, rest, _MOST - len(shared)), start=1):
                panels.append(Panel(f"{name}_part{part}", f"{title}{where}: {words}", [*shared, *some]))
    return panels


def _parts(group: str, arms: Sequence[ArmRecord], room: int) -> list[tuple[str, list[ArmRecord]]]:
    """The arms in parts of at most ``room``, each with its description: split by the values of the axis of ``group`` that has
    fewest, if the arms of every value fit into a part; else in order."""
    by_axis: list[dict[str, list[ArmRecord]]] = []
    for axis in reversed(varied_axes(arms, group)):
        values = [arm.groups[group].get(axis) for arm in arms]
        texts = ordered_values(axis, values)
        found = {f"{axis} {text}": [a for a in arms if value_text(axis, a.groups[group].get(axis)) == text] for text in texts}
        if all(len(some) <= room for some in found.values()):
            by_axis.append(found)
    if not by_axis or len(arms) in map(len, by_axis):  # with one axis, every value is one arm
        count = -(-len(arms) // room)
        chunks = [list(arms[turn : turn + room]) for turn in range(0, len(arms), room)]
        return [(f"part {n} of {count}, {c[0].name} to {c[-1].name}", c) for n, c in enumerate(chunks, start=1)]
    parts: list[tuple[list[str], list[ArmRecord]]] = []
    for words, some in min(by_axis, key=len).items():
        if parts and len(parts[-1][1]) + len(some) <= room:
            parts[-1][0].append(words.rpartition(" ")[2])
            parts[-1][1].extend(some)
        else:
            parts.append(([words], list(some)))
    return [(listed(words), some) for words, some in parts]


def lines_of_arms(arms: Sequence[ArmRecord], runs: Sequence[Sequence[RecordedRun]] | None = None) -> list[Line]:
    """The arms as they are drawn, each the mean of its seeds.

    The first is black and solid, unless it belongs to the sweep of the others. In a sweep the colours are the values of the
    axis with the most of them, dashes those of the others; single arms have colours and dashes of their own.

    ``runs``: what is drawn for every arm, instead of its own runs.
    """
    drawn = [arm.runs for arm in arms] if runs is None else runs
    names = short_labels([_named(arm) for arm in arms])
    places = [style.BLACK, *(style.place_beside_black(index) for index in range(len(arms) - 1))]
    looks = [(style.colour(place), number) for number, place in enumerate(places)]
    inside, group, axes = _sweep(arms)
    if axes:
        colours = axis_colours(
            axes[0], [arms[n].groups[group].get(axes[0]) for n in inside], [*arms[inside[0]].groups[group]].index(axes[0])
        )
        rests = [str([value_text(axis, arms[n].groups[group].get(axis)) for axis in axes[1:]]) for n in inside]
        turns = list(dict.fromkeys(rests))
        for n, rest in zip(inside, rests, strict=True):
            looks[n] = colours[value_text(axes[0], arms[n].groups[group].get(axes[0]))], turns.index(rest)
    lines = []
    for number, (seeds, name) in enumerate(zip(drawn, names, strict=True)):
        colour, turn = looks[number]
        dashes = ("solid", (0.0, (7.0, 1.6)), (0.0, (2.0, 1.2)), (0.0, (6.0, 1.4, 1.6, 1.4)))[turn % 4]
        lines.append(Line(mean_run(seeds, name), name, colour, style.marker(places[number]), dashes, tuple(seeds)))
    return lines


def _sweep(arms: Sequence[ArmRecord]) -> tuple[list[int], str, list[str]]:
    """Which of the arms are drawn as a sweep, its name, and its axes: the axis of the colours first, which has the most values,
    then those of the dashes."""
    group = next((name for name in arms[-1].groups if all(name in arm.groups for arm in arms[1:])), "")
    inside = [n for n, arm in enumerate(arms) if group in arm.groups and (n or arm.group == group)]
    axes = varied_axes([arms[n] for n in inside], group)
    counts = {axis: len({repr(arms[n].groups[group].get(axis)) for n in inside}) for axis in axes}
    return inside, group, sorted(counts, key=lambda axis: -counts[axis])


def caption_arms(arms: Sequence[ArmRecord]) -> str:
    """The meaning of colours and dashes in ``lines_of_arms``; '' if each arm has its own."""
    axes = _sweep(arms)[2]
    return (f" Colours: {axes[0]}" + (f", dashes: {', '.join(axes[1:])}" if axes[1:] else "") + ".") if axes else ""


def _named(arm: ArmRecord) -> str:
    """The arm's name, with the progress of its furthest run if none is complete."""
    return arm.name if arm.complete else f"{arm.name} ({max(trial.share for trial in arm.trials):.0%})"


@dataclasses.dataclass(frozen=True)
class Chains:
    """Chains drawn over the tokens of all their stages, and where the stages of the first one begin."""

    lines: list[Line]
    stages: list[tuple[float, str]]


def chains_of(experiment: ExperimentRecord) -> Chains | None:
    """Every chain as one line, as far as its stages have started, and single runs of the same length; ``None`` without chains.

    A seed is drawn if it has started all of the stages that the chain's furthest seed has.
    """
    arms: list[ArmRecord] = []
    runs: list[list[RecordedRun]] = []
    stages: list[tuple[float, str]] = []
    for end in chain_ends(experiment):
        way = [arm for arm in chain_stages(experiment, end) if arm.runs]
        common = [{t.seed: t.run for t in arm.shown if t.run is not None} for arm in way]
        seeds = [seed for seed in (common[0] if common else {}) if all(seed in found for found in common)]
        if not seeds:
            continue
        arms.append(dataclasses.replace(end, name=str(end.chain)))
        runs.append([joined_run([found[seed] for found in common], str(end.chain)) for seed in seeds])
        if len(way) > len(stages):
            ends = np.cumsum([0.0, *(arm.trials[0].tokens for arm in way)])
            stages = [(float(t), a.name.removeprefix(f"{a.chain}-")) for t, a in zip(ends, way, strict=False)]
    if not arms:
        return None
    for arm in whole_runs(experiment):
        if arm.runs:
            arms.append(arm)
            runs.append(arm.runs)
    return Chains(lines_of_arms(arms, runs), stages)


def draw_interpolation(arms: Sequence[ArmRecord]) -> Figure | None:
    """Loss on the straight line between the start and the final weights, against alpha; ``None`` if none was measured."""
    return _grid(
        arms,
        [
            (f"{role.capitalize()} loss", lambda run, role=role: _interpolation(run, role))  # type: ignore[misc]
            for role in (UPSTREAM, DOWNSTREAM)
        ],
        "alpha: 0 is the start, 1 the end of the run",
        tokens=False,
    )


def draw_dynamics(arms: Sequence[ArmRecord]) -> Figure | None:
    """Update ratio and distance from the start, both over all weights, and gradient norm, against tokens."""
    return _grid(
        arms,
        [
            ("Update ratio |step| / |weights|", lambda run: _dynamics(run, "update_ratio")),
            ("Distance from the start", lambda run: _dynamics(run, "distance")),
            ("Gradient norm (medians)", lambda run: medians(run, "grad_norm")),
        ],
        "tokens of this stage",
        tokens=True,
    )


def _grid(
    arms: Sequence[ArmRecord], panels: Sequence[tuple[str, Callable[[RecordedRun], Points]]], axis: str, *, tokens: bool
) -> Figure | None:
    """One panel for each quantity that some run has, with a line for the mean over the seeds of every arm; the names above."""
    lines = lines_of_arms(arms)
    told: list[tuple[str, list[tuple[Line, Points]]]] = []
    for title, points_of in panels:
        found = [(line, points) for line in lines if len((points := _mean_points(line, points_of))[0]) > 1]
        if found:
            told.append((title, found))
    if not told:
        return None
    shown = [line for line in lines if any(line is other for _, found in told for other, _ in found)]
    columns = max(1, min(len(shown), int(10.4 / (0.7 + 0.08 * max(len(line.label) for line in shown)))))
    head = 0.6 + 0.21 * -(-len(shown) // columns)
    with style.style():
        height = head + 3.2
        figure = style.new_figure(11.0, height)
        handles: list[Line2D] = []
        for column, (title, found) in enumerate(told):
            axes = figure.add_axes((0.07 + column * 0.325, 0.5 / height, 0.255, 2.7 / height))
            for line, (xs, ys) in found:
                axes.plot(xs, ys, color=line.colour, linestyle=line.dashes, linewidth=1.6)
                axes.plot(xs[-1:], ys[-1:], line.marker, color=line.colour, markersize=5, clip_on=False)
            axes.set_title(title)
            axes.set_xlabel(axis)
            axes.set_xlim(0, None)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
            if tokens:
                axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens_text(value)))
            style.quiet_axes(axes)
            if not handles:
                handles = [line.legend_entry(axes) for line in shown]
        figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.055, 1), ncols=columns, frameon=False, fontsize=9)
        return figure


def _mean_points(line: Line, points_of: Callable[[RecordedRun], Points]) -> Points:
    """The mean over the seeds, at the points that all of them have."""
    found = [points_of(run) for run in line.seeds or (line.run,)]
    xs = found[0][0]
    for other, _ in found[1:]:
        xs = np.intersect1d(xs, other)
    return xs, np.mean([ys[np.isin(own, xs)] for own, ys in found], axis=0)


def _interpolation(run: RecordedRun, role: str) -> Points:
    """The last measured curve: mean over the role's sets at every alpha."""
    events = [event for event in run.events if event["event"] == "interpolation" and event.get("role") == role]
    last = max((event["step"] for event in events), default=0)
    by_alpha: dict[float, dict[str, float]] = {}
    for event in events:
        if event["step"] == last:
            by_alpha.setdefault(float(event["alpha"]), {})[str(event["name"])] = float(event["loss"])
    alphas = sorted(by_alpha)
    return np.array(alphas), np.array([np.mean(list(by_alpha[alpha].values())) for alpha in alphas])


def _dynamics(run: RecordedRun, quantity: str) -> Points:
    told = [
        (float(event["tokens"]) - run.tokens_before, float(event["groups"]["all"][quantity]))
        for event in run.events
        if event["event"] == "dynamics" and event.get("groups", {}).get("all", {}).get(quantity) is not None
    ]
    return np.array([x for x, _ in told]), np.array([y for _, y in told])
