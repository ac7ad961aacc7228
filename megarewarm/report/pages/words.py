"""The runs of a report in plain sentences, each supported by the data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from megarewarm.record.run import RecordedRun
from megarewarm.report.numbers.runs import (
    LENGTHS,
    Change,
    RunRow,
    differences,
    labels,
    rows,
    same_length,
    same_value,
    unit_sentences,
)
from megarewarm.report.numbers.tasks import apart_sentences
from megarewarm.spelling import counted, listed, loss_text, rate_text, signed_text, tokens_text

# Losses that differ by less count as equal: the third decimal is noise of the validation sets and of the seed.
SAME = 0.005


_SAME_RATE = 0.005  # of the rate: smaller differences round to the same digits

_COMPARISONS = 2  # most comparisons of one setting

_LEARNING_RATES = ("schedule.max_lr", "schedule.min_lr", "schedule.constant_lr")


def summarise(runs: Sequence[RecordedRun]) -> list[str]:
    """The results of the runs as sentences of plain text. Raises nothing: it omits what the data lack."""
    table = rows(runs)
    return [
        *_overview(table),
        *unit_sentences(table[0].unit),
        *apart_sentences(runs),
        *_extremes(table),
        *_single_causes(runs, table),
        *_early_rise(table),
        *_scratch(table),
        *_incidents(runs, table),
    ]


def _overview(table: Sequence[RunRow]) -> list[str]:
    continued = [row for row in table if row.kind == "continued"]
    if not continued:
        return [
            f"{row.label} trained {tokens_text(row.tokens)} tokens in {row.steps:,} steps from scratch"
            + (
                f" and ended at an upstream loss of {loss_text(row.upstream.after)}."
                if row.upstream.after is not None and math.isfinite(row.upstream.after)
                else "."
            )
            for row in table
        ]
    each = " each" if len(continued) > 1 else ""
    shortest, longest = (pick(continued, key=lambda row: row.tokens) for pick in (min, max))
    if same_length(shortest.tokens, longest.tokens):
        span = f"for {longest.steps:,} steps ({tokens_text(longest.tokens)} tokens){each}"
    else:
        span = f"for {tokens_text(shortest.tokens)} ({shortest.label}) to {tokens_text(longest.tokens)} tokens"
        span += ", so their final losses are only partly comparable"
    origins = {row.origin for row in continued}
    origin = f"from {origins.pop()}" if len(origins) == 1 else f"from {len(origins)} checkpoints"
    text = f"{counted(len(continued), 'run')} continued training {origin}, {span}."
    if scratch := [row for row in table if row.kind == "scratch"]:
        verb = "was" if len(scratch) == 1 else "were"
        text += f" {_names(scratch)} {verb} trained from scratch for comparison."
    return [text]


def _extremes(table: Sequence[RunRow]) -> list[str]:
    """Which runs forgot and learned most among comparable ones; for a run without any, its own numbers."""
    changed = [row for row in table if row.forgetting is not None or row.adaptation is not None]
    if len(changed) < 2:
        return [text for row in changed for text in _own(row)]
    groups: list[list[RunRow]] = []
    for row in changed:
        like = [group for group in groups if group[0].sets == row.sets and same_length(group[0].tokens, row.tokens)]
        if like:
            like[0].append(row)
        else:
            groups.append([row])
    sentences = []
    for group in groups:
        of = ""
        if len(groups) > 1:
            of = f"Of the {len(group)} runs over {tokens_text(group[0].tokens)} tokens on {_sets(group[0])}: "
        if len(group) > 1:
            lost = [row for row in table if row.diverged and same_length(row.tokens, group[0].tokens)]
            of += f"Without {_names(lost)}, which diverged: " if lost else ""
            told = _superlatives(group, lost)
            sentences += [
                f"{of}{text[0].lower()}{text[1:]}" if of and text.startswith("The ") else f"{of}{text}" for text in told
            ]
        else:
            sentences += _own(group[0])
    return sentences


def _sets(row: RunRow) -> str:
    return ", ".join(dict.fromkeys(row.sets))


def _superlatives(table: Sequence[RunRow], lost: Sequence[RunRow]) -> list[str]:
    """Which of the comparable runs forgot and learned most, in one sentence with the highest peak if it is the same run and no
    diverged run, ``lost``, has a higher one."""
    forgot, learned = _first(table, "forgetting"), _first(table, "adaptation")
    claims = []
    if forgot and (forgot.forgetting or 0.0) > SAME:
        claims.append((forgot, f"forgot most ({signed_text(forgot.forgetting)} upstream)"))
    if learned and (learned.adaptation or 0.0) > SAME:
        claims.append((learned, f"learned most ({_downstream(learned)} downstream)"))
    loudest = _first([row for row in (*table, *lost) if row.kind == "continued"], "peak_lr", share=_SAME_RATE)
    together = [claim for row, claim in claims if row is loudest]
    sentences = []
    if loudest and together:
        peak = f"The highest peak LR, {rate_text(loudest.peak_lr)} in {loudest.label}"
        sentences.append(f"{peak}, {' and '.join(together)}.")
    sentences += [f"{row.label} {claim}." for row, claim in claims if row is not loudest]
    if least := _first(table, "forgetting", lowest=True):
        text = f"{least.label} forgot least ({signed_text(least.forgetting)} upstream"
        sentences.append(text + (f", {_downstream(least)} downstream)." if least.adaptation is not None else ")."))
    return sentences


def _own(row: RunRow) -> list[str]:
    """A lone run's numbers."""
    return [
        f"{row.label}: its {role} loss went from {loss_text(change.before)} to {loss_text(change.after)} ({told})."
        for role, change, told in (
            ("upstream", row.upstream, f"forgetting {signed_text(row.forgetting)}"),
            ("downstream", row.downstream, _downstream(row)),
        )
        if change.difference is not None
    ]


def _single_causes(runs: Sequence[RecordedRun], table: Sequence[RunRow]) -> list[str]:
    """For every setting, comparisons of the runs that differ in nothing else. Settings that change together count as one."""
    different = differences(runs)
    by_setting: dict[str, list[str]] = {}
    for key in different:
        by_setting.setdefault(_setting(key), []).append(key)
    sentences = []
    for setting in by_setting:
        groups: dict[str, list[int]] = {}
        for index, row in enumerate(table):
            rest = [_spelt(values[index]) for key, values in different.items() if _setting(key) != setting]
            if row.kind == "continued" and runs[index].config:
                groups.setdefault(repr(rest), []).append(index)
        keys = by_setting[setting]
        told = groups.values() if setting in LENGTHS else [_of_one_length(group, table) for group in groups.values()]
        compared = [group for group in told if any(not _alike(group[0], i, keys, different) for i in group)]
        for group in compared[:_COMPARISONS]:
            sentences += _compare(setting, keys, group, different, table)
    return sentences


def _of_one_length(group: Sequence[int], table: Sequence[RunRow]) -> list[int]:
    """The runs that trained as far as the longest: a stopped run has another final loss for that reason alone."""
    most = max(table[index].tokens for index in group)
    return [index for index in group if same_length(table[index].tokens, most)]


def _alike(one: int, other: int, keys: Sequence[str], different: dict[str, list[Any]]) -> bool:
    return all(same_value(different[key][one], different[key][other]) for key in keys)


def _compare(
    setting: str, keys: Sequence[str], group: Sequence[int], different: dict[str, list[Any]], table: Sequence[RunRow]
) -> list[str]:
    """A sentence on forgetting and one on the downstream loss: the extremes over the runs, and whether there is a trend."""
    key = "schedule.max_lr" if setting == "peak LR" else keys[0] if len(keys) == 1 else None
    values: dict[int, Any] = {index: different[key][index] for index in group} if key in different else {}
    if key == "schedule.max_lr":
        values = {index: table[index].peak_lr for index in group}
    numeric = bool(values) and all(isinstance(value, int | float) for value in values.values())
    group = sorted(group, key=lambda index: values[index]) if numeric else list(group)

    def shown(index: int) -> str:
        if index not in values:
            return table[index].label
        value = rate_text(values[index]) if setting == "peak LR" else _value_text(values[index])
        return f"{table[index].label} ({value})"

    span = f"{shown(group[0])} → {shown(group[-1])}" if numeric or len(group) == 2 else _some([table[index] for index in group])
    sentences = []
    for name, numbers in (
        ("forgetting", [table[index].forgetting for index in group]),
        ("downstream loss", [table[index].downstream.after for index in group]),
    ):
        exact = [number for number in numbers if number is not None and math.isfinite(number)]
        if len(exact) < len(group):
            continue
        spelt = signed_text if name == "forgetting" else loss_text
        steps = [b - a for a, b in itertools.pairwise(exact)]
        text = f"{spelt(exact[0])} → {spelt(exact[-1])}"
        if max(exact) - min(exact) < SAME:
            text = f"{spelt(exact[0])}, equal within {SAME:g}"
        elif len(exact) > 2 and not numeric:
            lowest, highest = (pick(range(len(exact)), key=exact.__getitem__) for pick in (min, max))
            ends = [f"{spelt(exact[at])} in {table[group[at]].label}" for at in (lowest, highest)]
            text = " to ".join(ends)
        elif len(exact) > 2 and not any(same_value(values[a], values[b]) for a, b in itertools.pairwise(group)):
            if all(step > 0 for step in steps) or all(step < 0 for step in steps):
                text += " (rising throughout)" if steps[0] > 0 else " (falling throughout)"
            elif max(steps) > SAME and min(steps) < -SAME:
                text = f"from {spelt(min(exact))} to {spelt(max(exact))}, no steady trend"
        sentences.append(f"Runs that differ only in {setting}, {span}: {name} {text}.")
    return sentences


def _setting(key: str) -> str:
    """The common name of keys that are changed together."""
    if key in _LEARNING_RATES:
        return "peak LR"
    if key.startswith("data.train"):
        return "training data"
    first, _, rest = key.partition(".")
    if first in ("replay", "start", "model", "optimizer"):
        return first
    return rest if first == "schedule" else key


def _early_rise(table: Sequence[RunRow]) -> list[str]:
    sentences = []
    for role in ("upstream", "downstream"):
        risen: list[tuple[float, RunRow, Change]] = []
        for row in table:
            change = row.upstream if role == "upstream" else row.downstream
            if change.peak_rise is None or change.difference is None:
                continue
            if change.peak_rise - change.difference > max(SAME, change.peak_rise / 20) and change.peak_rise > SAME:
                risen.append((change.peak_rise, row, change))
        if not risen:
            continue
        rise, row, change = max(risen, key=lambda entry: entry[0])
        peak = f"{signed_text(rise)} after {tokens_text(change.peak_tokens or 0)} tokens"
        end = f"{signed_text(change.difference)} at the end"
        runs = _some([row for _, row, _ in risen])
        most = len(risen) > 1 and sorted(other for other, *_ in risen)[-2] < rise - SAME
        which = f"highest in {row.label}" if most else f"in {row.label}" if len(risen) > 1 else ""
        sentences.append(
            f"The {role} loss first rose and then fell in {runs}{f'; {which}' if which else ''}: {peak}, {end}."
            if len(table) > 1
            else f"The {role} loss first rose and then fell: {peak}, {end}."
        )
    return sentences


def _scratch(table: Sequence[RunRow]) -> list[str]:
    sentences = []
    continued = [row for row in table if row.kind == "continued" and row.downstream.after is not None]
    for row in table:
        after = row.downstream.after
        others = [other for other in continued if other.tokens <= row.tokens * 1.001 and other.sets == row.sets]
        if row.kind != "scratch" or after is None or not math.isfinite(after) or not others:
            continue
        better = sum((other.downstream.after or 0.0) < after - SAME for other in others)
        ended = f"{better} of the {len(others)}" if 0 < better < len(others) else "none" if not better else "all"
        sentences.append(
            f"{row.label}, trained from scratch, reached a downstream loss of {loss_text(after)}; of the runs that "
            f"started from a checkpoint and used no more tokens, {ended} ended lower."
        )
    return sentences


def _incidents(runs: Sequence[RecordedRun], table: Sequence[RunRow]) -> list[str]:
    sentences = [f"{row.label} diverged: its last loss is not finite." for row in table if row.diverged]
    for run, label in zip(runs, labels(runs), strict=True):
        resumes = sum(event["event"] == "resume" for event in run.events)
        alarms = [event for event in run.events if event["event"] == "alarm"]
        total = run.start.get("total_steps")
        if isinstance(total, int) and 0 < (last := run.first_step + run.steps) < total:
            sentences.append(f"{label} is not complete: {last:,} of {total:,} steps.")
        if resumes:
            sentences.append(f"{label} was resumed {counted(resumes, 'time')}; repeated steps are counted once.")
        for event in alarms[:3]:
            what = event.get("message") or event.get("reason") or event.get("kind") or "alarm"
            sentences.append(f"{label}, step {event.get('step', '?')}: {what}.".replace("..", "."))
        if len(alarms) > 3:
            sentences.append(f"{label} raised {len(alarms) - 3} more alarms.")
    return sentences


def _first(table: Sequence[RunRow], measure: str, lowest: bool = False, share: float | None = None) -> RunRow | None:
    """The row at the upper (or lower) end, if it leads by more than ``SAME``, or by a ``share`` of its value; else ``None``."""
    ranked = [row for row in table if getattr(row, measure) is not None]
    ranked.sort(key=lambda row: getattr(row, measure), reverse=not lowest)
    if len(ranked) < 2:
        return None
    first, second = (getattr(row, measure) for row in ranked[:2])
    if abs(first - second) <= (SAME if share is None else share * max(abs(first), abs(second))):
        return None
    return ranked[0]


def _downstream(row: RunRow) -> str:
    """With the sign of adaptation in the table: a fall of the loss is positive."""
    return f"adaptation {signed_text(row.adaptation)}"


def _spelt(value: Any) -> str:
    """Text that is equal for values that differ by rounding."""
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


def _value_text(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _some(table: Sequence[RunRow]) -> str:
    return _names(table) if len(table) <= 4 else f"{len(table)} runs"


def _names(table: Sequence[RunRow]) -> str:
    return listed([row.label for row in table])
