"""An experiment in plain sentences, each supported by the data, with the uncertainty over seeds.

Two arms differ only if the 95 % interval of their difference, paired by seed, excludes 0.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from megarewarm.report.figures.heatmap import grid_of
from megarewarm.report.figures.pareto import comparable, front
from megarewarm.report.numbers.arms import CHAINS, ArmRow, Comparison
from megarewarm.report.numbers.experiment import ExperimentRecord
from megarewarm.report.numbers.runs import same_length, unit_sentences
from megarewarm.report.numbers.seeds import LEVEL, Difference, paired
from megarewarm.report.numbers.tasks import apart_sentences
from megarewarm.report.pages.words import SAME
from megarewarm.spelling import MINUS, counted, listed, loss_text, signed_text, tokens_text

_NAMES = {"upstream_after": "upstream loss", "downstream_after": "downstream loss"}
_NAMED = 3  # names in a sentence


def summarise_experiment(experiment: ExperimentRecord, rows: Sequence[ArmRow], compared: Sequence[Comparison]) -> list[str]:
    """The results of the experiment as sentences of plain text; it omits what the data lack."""
    return [
        *_overview(experiment),
        *unit_sentences(experiment.unit),
        *apart_sentences([run for arm in experiment.arms for run in arm.runs]),
        *_noise(rows),
        *_grids(experiment, rows),
        *_main(experiment, rows),
        *_groups(compared),
        *_by_chance(compared),
        *_front(rows),
        *_early_rise(rows),
        *_saved(rows),
        *_incidents(experiment, rows),
    ]


def difference_text(difference: Difference) -> str:
    """'+0.120 ± 0.031', or '+0.120' for one seed."""
    margin = difference.margin
    return signed_text(difference.mean) + ("" if margin is None else f" ± {margin:.3f}")


def _overview(experiment: ExperimentRecord) -> list[str]:
    seeds = experiment.seeds
    states = [trial.state for trial in experiment.trials]
    done = states.count("complete")
    arms = counted(len(experiment.arms), "arm")
    if done == len(states):
        named = (
            f"{len(seeds)} seeds" if len(seeds) > _NAMED else f"seed{'s' * (len(seeds) > 1)} {listed(map(str, seeds or [0]))}"
        )
        each = f", each with {named}" if seeds else ""
        return [f"{arms}{each}: all {counted(done, 'run')} are complete."]
    rest = [f"{states.count(state)} {state}" for state in ("under way", "diverged", "not begun") if state in states]
    text = f"{arms}: {done} of {counted(len(states), 'run')} complete, {listed(rest)}."
    return [f"{text} Numbers are from complete runs only."]


def _noise(rows: Sequence[ArmRow]) -> list[str]:
    if not any(row.seeds[0] for row in rows):
        return []
    parts = []
    for measure, name in _NAMES.items():
        deviations = [d for row in rows if row.kind == "continued" and (d := row.spread(measure).deviation) is not None]
        if deviations:
            parts.append(f"{statistics.median(deviations):.3f} in the {name}")
    if not parts:
        return [
            "No arm has more than one complete seed, so the seed noise is unknown: the numbers below are single observations."
        ]
    return [f"Between seeds, an arm varies by {listed(parts)} (standard deviation of the final loss, median over arms)."]


def _main(experiment: ExperimentRecord, rows: Sequence[ArmRow]) -> list[str]:
    row = next((row for row in rows if experiment.main and row.name == experiment.main.name), None)
    if row is None:
        return []
    parts = []
    for role, measure in (("upstream", "forgetting"), ("downstream", "adaptation")):
        after, change = row.mean(f"{role}_after"), row.mean(measure)
        if after is not None and change is not None:
            parts.append(f"{measure} {signed_text(change)} (final {role} loss {loss_text(after)})")
    return [f"{row.name}, the reference arm: {listed(parts)}."] if parts else []


def _grids(experiment: ExperimentRecord, rows: Sequence[ArmRow]) -> list[str]:
    """The best cell of every sweep over two axes, and those within seed noise of it."""
    sentences = []
    for sweep in experiment.groups:
        grid = grid_of(rows, sweep)
        if grid is None:
            continue
        measure, title = grid.measures[0]
        ranked = grid.ranked(measure)
        if len(ranked) < 2:
            continue
        best, second = (row.mean(measure) or 0.0 for row in ranked[:2])
        what = f"{title[0].lower()}{title[1:]}"
        if second - best <= SAME:
            same = [row.name for row in ranked if (row.mean(measure) or 0.0) - best <= SAME]
            text = f"Sweep {sweep}: the lowest {what} is {loss_text(best)}, equal within {SAME:g} in {_few(same)}."
            sentences.append(text)
            continue
        ends = [
            f"{name} {loss_text(mean)}"
            for key, name in _NAMES.items()
            if key != measure and (mean := ranked[0].mean(key)) is not None
        ]
        text = f"Sweep {sweep}: {grid.place(ranked[0])} has the lowest {what}, {loss_text(best)}"
        text += f" ({', '.join(ends)})." if ends else "."
        differences = {row.name: paired(row.values[measure], ranked[0].values[measure]) for row in ranked[1:]}
        if alike := [name for name, d in differences.items() if d is not None and d.margin is not None and not d.established]:
            text += f" Within seed noise of it: {_few(alike)}."
        sentences.append(text)
    return sentences


def _groups(compared: Sequence[Comparison]) -> list[str]:
    """For every sweep and each loss a sentence: which arms differ from its reference, which don't significantly. Arms of
    another length are only named."""
    by_group: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in compared:
        if comparison.measure in _NAMES:
            by_group.setdefault((comparison.group, comparison.reference), []).append(comparison)
    sentences = []
    for (group, reference), inside in by_group.items():
        where = {CHAINS: "Chains", "": "Single arms"}.get(group, f"Sweep {group}")
        if other := {c.arm: c.tokens for c in inside if not c.same_length}:
            lengths = _few([f"{arm} ({tokens_text(own)})" for arm, (own, _) in other.items()])
            each = tokens_text(next(iter(other.values()))[1])
            sentences.append(f"{where}: not compared with {reference} ({each} tokens) because of another length: {lengths}.")
        inside = [c for c in inside if c.same_length]
        known = [c for c in inside if c.difference.margin is not None]
        if not known:
            parts = [text for measure in _NAMES if (text := _range([c for c in inside if c.measure == measure]))]
            if parts:
                sentences.append(f"{where}, against {reference}, one seed: {'; '.join(parts)}.")
            continue
        unclear = dict.fromkeys(c.arm for c in known if not c.difference.established)
        alike = [arm for arm in unclear if not any(c.difference.established for c in known if c.arm == arm)]
        for measure, name in _NAMES.items():
            parts = [text for sign in (-1, 1) if (text := _differing([c for c in known if c.measure == measure], sign))]
            partly = [c.arm for c in known if c.measure == measure and not c.difference.established and c.arm not in alike]
            if parts and partly:
                parts.append(f"no significant difference in {_few(partly)}")
            if parts:
                sentences.append(f"{where}, against {reference}: {name} {'; '.join(parts)}.")
        if alike:
            sentences.append(f"{where}, against {reference}: no difference beyond seed noise in {_few(alike)}.")
    return sentences


def _range(inside: Sequence[Comparison]) -> str:
    """'upstream -0.100 in a to +0.300 in b': the extremes of differences of one seed."""
    ranked = sorted((c for c in inside if math.isfinite(c.difference.mean)), key=lambda c: c.difference.mean)
    if not ranked:
        return ""
    low, high = ranked[0], ranked[-1]
    text = f"{_NAMES[low.measure].removesuffix(' loss')} {signed_text(low.difference.mean)}"
    if high.difference.mean - low.difference.mean > SAME:
        return f"{text} in {low.arm} to {signed_text(high.difference.mean)} in {high.arm}"
    return f"{text} in {low.arm}" if high is low else f"{text}, equal within {SAME:g}"


def _differing(inside: Sequence[Comparison], sign: int) -> str:
    """'higher in a (+0.120 \u00b1 0.031)', of several the names and the largest difference; '' if none differs."""
    differing = [c for c in inside if c.difference.established and c.difference.mean * sign > 0]
    if not differing:
        return ""
    ranked = sorted(differing, key=lambda c: -abs(c.difference.mean))
    text = f"{'lower' if sign < 0 else 'higher'} in {_few([c.arm for c in differing])}"
    most = len(ranked) > 1 and abs(ranked[0].difference.mean) - abs(ranked[1].difference.mean) > SAME
    which = f"most in {ranked[0].arm}: " if most else "up to " if len(ranked) > 1 else ""
    return f"{text} ({which}{difference_text(ranked[0].difference)})"


def _few(names: Sequence[str]) -> str:
    """The names; if there are many, the first three."""
    if len(names) > _NAMED + 1:
        return f"{', '.join(names[:_NAMED])} and others"
    return listed(names)


def _by_chance(compared: Sequence[Comparison]) -> list[str]:
    count = sum(c.difference.margin is not None and c.same_length and c.measure in _NAMES for c in compared)
    if count < 10:
        return []
    expected = round(count * (1 - LEVEL))
    return [
        f"These are {count} comparisons at {LEVEL:.0%} confidence: without any real difference, about {expected} would still "
        "appear significant. Numbers are means paired by seed, ± half the interval."
    ]


def _front(rows: Sequence[ArmRow]) -> list[str]:
    sentences = []
    for group in comparable(rows):
        if len(group) < 3:
            continue
        points = [(row.mean("forgetting") or 0.0, row.mean("adaptation") or 0.0) for row in group]
        best = front(points)
        first, last = group[best[0]], group[best[-1]]
        names = listed([group[i].name for i in best]) if len(best) <= 4 else f"{len(best)} arms, {first.name} to {last.name},"
        verb = "is" if len(best) == 1 else "are"
        length = tokens_text(group[0].mean("tokens") or 0.0)
        start = f" of the {len(group)} arms of {length} tokens from {group[0].arm.start}"
        sentences.append(f"By the means, {names} {verb} on the front: no other{start} forgets less and learns more.")
    return sentences


def _early_rise(rows: Sequence[ArmRow]) -> list[str]:
    sentences = []
    for role in ("upstream", "downstream"):
        able = [row for row in rows if row.kind == "continued" and row.arm.chain is None]
        risen = [row for row in able if (row.mean(f"{role}_rise") or 0.0) > SAME]
        if not risen:
            continue
        back = [row for row in risen if row.values[f"{role}_recovered_tokens"] and not _never(row, role)]
        ranked = sorted(risen, key=lambda row: -(row.mean(f"{role}_rise") or 0.0))
        highest = ranked[0]
        rise, at = highest.mean(f"{role}_rise"), highest.mean(f"{role}_rise_tokens")
        tied = len(ranked) > 1 and (rise or 0.0) - (ranked[1].mean(f"{role}_rise") or 0.0) <= SAME
        most = "in" if len(risen) == 1 else "for example in" if tied else "most in"
        text = f"The {role} loss rose above its start in {len(risen)} of {counted(len(able), 'arm')}, {most} {highest.name}: "
        text += f"{signed_text(rise)} after {tokens_text(at or 0.0)} tokens. "
        if not back:
            text += "In none of them did it return to the start value in every seed."
        else:
            text += f"It returned to the start value in every seed in {len(back)} of these."
        sentences.append(text)
    return sentences


def _never(row: ArmRow, role: str) -> bool:
    return row.spread(f"{role}_recovered_tokens").others > 0


def _saved(rows: Sequence[ArmRow]) -> list[str]:
    """Compared with the arm from scratch: the extremes, and which arms never reached its loss."""
    able = [row for row in rows if row.values.get("tokens_saved") and row.arm.chain is None]
    sentences = []
    for scratch in dict.fromkeys(row.scratch for row in able):
        tokens = next((row.mean("tokens") or 0.0 for row in rows if row.name == scratch), 0.0)
        same = [row for row in able if row.scratch == scratch and _as_long(row, tokens)]
        if not same:
            continue
        reached = [row for row in same if not row.spread("tokens_saved").others]
        text = f"{len(reached)} of {counted(len(same), 'arm')} reached the final downstream loss of {scratch}, "
        text += "which was trained from scratch, in every seed"
        if reached:
            least, most = (_tokens(pick(reached, key=lambda row: row.mean("tokens_saved") or 0.0)) for pick in (min, max))
            text += f", and saved {least if least == most else f'{least} to {most}'} tokens"
        sentences.append(f"{text}.")
    return sentences


def _as_long(row: ArmRow, tokens: float) -> bool:
    """Whether the arm reached the final loss of the one from scratch, or had as many ``tokens`` for it."""
    own = row.mean("tokens") or 0.0
    return not row.spread("tokens_saved").others or own > tokens or same_length(own, tokens)


def _tokens(row: ArmRow) -> str:
    saved = row.mean("tokens_saved") or 0.0
    return f"{MINUS if saved < 0 else ''}{tokens_text(abs(saved))}"


def _incidents(experiment: ExperimentRecord, rows: Sequence[ArmRow]) -> list[str]:
    sentences = []
    for row in rows:
        bad = max(row.spread(f"{role}_after").others for role in ("upstream", "downstream"))
        if bad:
            sentences.append(f"{row.name} diverged in {bad} of {counted(row.seeds[0], 'run')}; its means exclude these.")
    for trial in experiment.trials:
        alarms = [event for event in trial.run.events if event["event"] == "alarm"] if trial.run else []
        if alarms:
            sentences.append(
                f"{trial.name} raised {counted(len(alarms), 'alarm')}, the first at step {alarms[0].get('step', '?')}."
            )
    return sentences[:8]
