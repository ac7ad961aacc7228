"""An experiment in plain sentences, each of which its data carry, with what the seeds say of its certainty.

Two arms are said to differ only where the 95 % interval of their difference, paired by seed, excludes 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from megarewarm.report.figures.pareto import comparable, front
from megarewarm.report.numbers.arms import CHAINS, ArmRow, Comparison
from megarewarm.report.numbers.experiment import ExperimentRecord
from megarewarm.report.numbers.runs import same_length
from megarewarm.report.numbers.seeds import LEVEL, Difference
from megarewarm.report.pages.words import SAME
from megarewarm.spelling import MINUS, counted, listed, loss_text, signed_text, tokens_text

_NAMES = {"upstream_after": "upstream loss", "downstream_after": "downstream loss"}


def summarise_experiment(experiment: ExperimentRecord, rows: Sequence[ArmRow], compared: Sequence[Comparison]) -> list[str]:
    """What the experiment shows, as sentences of plain text; what the data lack is not spoken of."""
    return [
        *_overview(experiment),
        *_noise(rows),
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
    each = f", each with seeds {listed(map(str, seeds))}" if len(seeds) > 1 else f", each with seed {seeds[0]}" if seeds else ""
    states = [trial.state for trial in experiment.trials]
    done = states.count("complete")
    text = f"{counted(len(experiment.arms), 'arm')}{each}: "
    if done == len(states):
        return [f"{text}all {counted(done, 'run')} are complete."]
    rest = [f"{states.count(state)} {state}" for state in ("under way", "not begun") if state in states]
    return [f"{text}{done} of {counted(len(states), 'run')} complete, {listed(rest)}. Numbers are of complete runs only."]


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
            "No arm has more than one complete seed, so nothing is known about how much of a difference is chance: the numbers "
            "below are single observations."
        ]
    return [f"From seed to seed, the end of an arm varies by {listed(parts)} (standard deviation, median over arms)."]


def _main(experiment: ExperimentRecord, rows: Sequence[ArmRow]) -> list[str]:
    row = next((row for row in rows if experiment.main and row.name == experiment.main.name), None)
    if row is None:
        return []
    parts = []
    for role, measure, sign in (("upstream", "forgetting", 1), ("downstream", "adaptation", -1)):
        before, after, change = (row.mean(key) for key in (f"{role}_before", f"{role}_after", measure))
        if before is not None and after is not None and change is not None:
            spread = row.spread(measure)
            low, high = sorted(sign * value for value in (spread.low or 0.0, spread.high or 0.0))
            over = f", {signed_text(low)} to {signed_text(high)} over seeds" if len(spread.values) > 1 else ""
            parts.append(
                f"its {role} loss went from {loss_text(before)} to {loss_text(after)} ({signed_text(sign * change)}{over})"
            )
    return [f"{row.name}, the arm that others are compared with: {listed(parts)}."] if parts else []


def _groups(compared: Sequence[Comparison]) -> list[str]:
    """One sentence for every sweep: who differs from its reference in what, who can't be told apart from it. Arms of another
    length are only named."""
    by_group: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in compared:
        if comparison.measure in _NAMES:
            by_group.setdefault((comparison.group, comparison.reference), []).append(comparison)
    sentences = []
    for (group, reference), inside in by_group.items():
        where = {CHAINS: "Chains", "": "Single arms"}.get(group, f"Sweep {group}")
        if other := {c.arm: c.tokens for c in inside if not c.same_length}:
            lengths = listed(f"{arm} ({tokens_text(own)})" for arm, (own, _) in other.items())
            each = tokens_text(next(iter(other.values()))[1])
            sentences.append(f"{where}: not compared with {reference} ({each} tokens), for another length: {lengths}.")
        inside = [c for c in inside if c.same_length]
        known = [c for c in inside if c.difference.margin is not None]
        if not known:
            told = [f"{c.arm} {signed_text(c.difference.mean)}" for c in inside if c.measure == "downstream_after"]
            ups = [f"{c.arm} {signed_text(c.difference.mean)}" for c in inside if c.measure == "upstream_after"]
            parts = [f"{name} {', '.join(t)}" for name, t in (("upstream", ups), ("downstream", told)) if t]
            if parts:
                sentences.append(f"{where}, against {reference}, one seed: {'; '.join(parts)}.")
            continue
        parts = []
        for measure, name in _NAMES.items():
            for word, sign in (("lower", -1), ("higher", 1)):
                told = [
                    f"{c.arm} ({difference_text(c.difference)})"
                    for c in known
                    if c.measure == measure and c.difference.established and c.difference.mean * sign > 0
                ]
                if told:
                    parts.append(f"{name} {word} in {listed(told)}")
        unclear = dict.fromkeys(c.arm for c in known if not c.difference.established)
        alike = [arm for arm in unclear if not any(c.difference.established for c in known if c.arm == arm)]
        if alike:
            parts.append(f"no difference beyond the seeds' spread in {listed(alike)}")
        open_ones = [c for c in known if not c.difference.established and c.arm not in alike]
        partly = [f"the {_NAMES[c.measure]} of {c.arm}" for c in open_ones]
        if partly:
            parts.append(f"not told apart: {listed(partly)}")
        if parts:
            sentences.append(f"{where}, against {reference}: {'; '.join(parts)}.")
    return sentences


def _by_chance(compared: Sequence[Comparison]) -> list[str]:
    count = sum(c.difference.margin is not None and c.same_length and c.measure in _NAMES for c in compared)
    if count < 10:
        return []
    expected = round(count * (1 - LEVEL))
    return [
        f"These are {count} comparisons at {LEVEL:.0%} confidence: if nothing differed, about {expected} would still look as "
        "if something did. Numbers are means paired by seed, ± half the interval."
    ]


def _front(rows: Sequence[ArmRow]) -> list[str]:
    sentences = []
    for group in comparable(rows):
        if len(group) < 3:
            continue
        points = [(row.mean("forgetting") or 0.0, row.mean("adaptation") or 0.0) for row in group]
        best = front(points)
        first, last = group[best[0]], group[best[-1]]
        names = listed([group[i].name for i in best]) if len(best) <= 8 else f"{len(best)} arms, {first.name} to {last.name},"
        verb = "is" if len(best) == 1 else "are"
        start = f" of the {len(group)} arms that started from {group[0].arm.start}"
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
        highest = max(risen, key=lambda row: row.mean(f"{role}_rise") or 0.0)
        rise, at = highest.mean(f"{role}_rise"), highest.mean(f"{role}_rise_tokens")
        most = "most in" if len(risen) > 1 else "in"
        text = f"The {role} loss rose above its start in {len(risen)} of {counted(len(able), 'arm')}, {most} {highest.name}: "
        text += f"{signed_text(rise)} after {tokens_text(at or 0.0)} tokens. "
        if not back:
            text += "In none of them did it come back to the start in every seed."
        else:
            quick, slow = (pick(_recovered(row, role) for row in back) for pick in (min, max))
            first, last = tokens_text(quick), tokens_text(slow)
            span = first if first == last else f"{first} to {last}"
            text += f"It came back in every seed in {len(back)} of these, after {span} tokens on average."
        sentences.append(text)
    return sentences


def _never(row: ArmRow, role: str) -> bool:
    return row.spread(f"{role}_recovered_tokens").others > 0


def _recovered(row: ArmRow, role: str) -> float:
    return row.mean(f"{role}_recovered_tokens") or 0.0


def _saved(rows: Sequence[ArmRow]) -> list[str]:
    """Against the arm from scratch: the extremes, and who never got there."""
    able = [row for row in rows if row.values.get("tokens_saved") and row.arm.chain is None]
    sentences = []
    for scratch in dict.fromkeys(row.scratch for row in able):
        tokens = next((row.mean("tokens") or 0.0 for row in rows if row.name == scratch), 0.0)
        same = [row for row in able if row.scratch == scratch and _as_long(row, tokens)]
        if not same:
            continue
        reached = [row for row in same if not row.spread("tokens_saved").others]
        text = (
            f"{len(reached)} of {counted(len(same), 'arm')} came as low downstream as {scratch} did from scratch, in every seed"
        )
        if reached:
            ranked = sorted(reached, key=lambda row: row.mean("tokens_saved") or 0.0)
            least, most = ranked[0], ranked[-1]
            if len(reached) == 1:
                text += f"; {most.name} saved {_tokens(most)} tokens on the way"
            elif _tokens(least) != _tokens(most):
                text += f"; {most.name} saved most tokens on the way ({_tokens(most)}), {least.name} least ({_tokens(least)})"
            else:
                text += f"; each saved {_tokens(most)} tokens on the way"
        sentences.append(f"{text}.")
    return sentences


def _as_long(row: ArmRow, tokens: float) -> bool:
    """Whether the arm got where the one from scratch ended, or had as many ``tokens`` for it."""
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
            sentences.append(f"{row.name} diverged in {bad} of {counted(row.seeds[0], 'run')}; these are not in its means.")
    for trial in experiment.trials:
        alarms = [event for event in trial.run.events if event["event"] == "alarm"] if trial.run else []
        if alarms:
            sentences.append(
                f"{trial.name} raised {counted(len(alarms), 'alarm')}, the first at step {alarms[0].get('step', '?')}."
            )
    return sentences[:8]
