"""The runs of a report in numbers: one row per run, and the keys in which their configs differ.

Losses are mean cross entropies in nats per token, or in bits per byte where tokenizers differ (``RecordedRun.unit``);
perplexity is exp(loss) of the former. Forgetting is the rise of the upstream loss, adaptation the fall of the downstream loss,
both relative to the checkpoint that the run started from.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np

from megarewarm.record.events import TaskEvent
from megarewarm.record.lines import number
from megarewarm.record.run import APART, BITS, DOWNSTREAM, NATS, UPSTREAM, Curve, RecordedRun
from megarewarm.report.numbers.tasks import TaskKey, tests_of

Kind = Literal["pretraining", "scratch", "continued"]

LENGTHS = ("training.budget", "training.global_batch", "data.sequence_length")
"""Settings that determine the number of training tokens."""

_NOT_A_SETTING = ("name", "folder")


@dataclasses.dataclass(frozen=True)
class Change:
    """A role's loss before and after a run; ``after`` is infinite if it diverged.

    ``peak_rise`` is the highest finite evaluation minus ``before``, at least 0, and ``peak_tokens`` its position.
    ``recovered_tokens`` is the position of the first evaluation after the peak that is at or below ``before``, infinite if
    there is none (whether the stability gap closed); ``None`` if the loss never rose.

    A field is ``None`` if the run has no such number. Only runs that started from a checkpoint have ``before`` and what follows
    from it.
    """

    before: float | None = None
    after: float | None = None
    peak_rise: float | None = None
    peak_tokens: float | None = None
    recovered_tokens: float | None = None

    @property
    def difference(self) -> float | None:
        if self.before is None or self.after is None or not math.isfinite(self.after):
            return None
        return self.after - self.before


@dataclasses.dataclass(frozen=True)
class RunRow:
    """One run in numbers; ``label`` is its name, made unique within the report, ``sets`` are its validation sets: losses are
    comparable only if these are the same. ``tokens_per_second`` is the median over steps, ``wall_time`` is in seconds.
    ``merged``: by role, the loss of the average of its last weights. ``tests``: on each task, in order."""

    label: str
    kind: Kind
    origin: str | None
    peak_lr: float | None
    steps: int
    tokens: float
    upstream: Change
    downstream: Change
    sets: tuple[str, ...] = ()
    tokens_per_second: float | None = None
    wall_time: float | None = None
    merged: Mapping[str, float] = dataclasses.field(default_factory=dict)
    unit: str = NATS
    tests: Mapping[TaskKey, Sequence[TaskEvent]] = dataclasses.field(default_factory=dict)

    @property
    def forgetting(self) -> float | None:
        return self.upstream.difference

    @property
    def adaptation(self) -> float | None:
        difference = self.downstream.difference
        return None if difference is None else -difference

    @property
    def diverged(self) -> bool:
        """Whether a last loss was not finite."""
        return math.inf in (self.upstream.after, self.downstream.after)


def perplexity(loss: float | None, unit: str = NATS) -> float | None:
    """exp(loss); infinite instead of an overflow, ``None`` for ``None`` and for a loss in bits per byte."""
    return None if loss is None or unit == BITS else math.exp(loss) if loss < 700 else math.inf


def unit_sentences(unit: str) -> list[str]:
    """What a reader must know of validation losses in ``unit``."""
    if unit == BITS:
        return ["The tokenizers of the runs differ: validation losses are in bits per byte of text, training losses are not."]
    if unit == APART:
        return [
            "The tokenizers of the runs differ, and not every validation loss is known in bits per byte: losses in nats per "
            "token don't compare between tokenizers."
        ]
    return []


def rows(runs: Sequence[RecordedRun]) -> list[RunRow]:
    """One row per run, in order."""
    return [row_of(run, label, kind) for run, label, kind in zip(runs, labels(runs), kinds(runs), strict=True)]


def row_of(run: RecordedRun, label: str, kind: Kind) -> RunRow:
    """``run`` in numbers."""
    rates = run.train["tokens_per_second"][np.isfinite(run.train["tokens_per_second"])]
    return RunRow(
        label=label,
        kind=kind,
        origin=run.origin,
        peak_lr=run.peak_lr,
        steps=run.steps,
        tokens=run.tokens,
        upstream=change_of(run, UPSTREAM),
        downstream=change_of(run, DOWNSTREAM),
        sets=(*run.sets(UPSTREAM), *run.sets(DOWNSTREAM)),
        tokens_per_second=float(np.median(rates)) if len(rates) else None,
        wall_time=wall_time(run),
        merged={role: loss for role in (UPSTREAM, DOWNSTREAM) if (loss := merged_loss(run, role)) is not None},
        unit=run.unit,
        tests=tests_of(run),
    )


def merged_loss(run: RecordedRun, role: str) -> float | None:
    """The loss of the average of the run's last weights (``checkpoint.average``), the mean over the role's sets; infinite if it
    is not finite, ``None`` without an average."""
    losses = {
        event["name"]: number(event.get("loss"))
        for event in run.events
        if event["event"] == "average" and event.get("role") == role
    }
    if not losses:
        return None
    mean = sum(losses.values()) / len(losses)
    return mean if math.isfinite(mean) else math.inf


def wall_time(run: RecordedRun) -> float | None:
    """Seconds that the run's processes took, from the times of its events: from each start to the last event before the next
    one, so pauses do not count. ``None`` if no event has a time."""
    total, begun, last = 0.0, None, None
    for event in (run.start, *run.events):
        time = number(event.get("time"))
        if not math.isfinite(time):
            continue
        if begun is None or last is None or event.get("event") == "resume":
            total += 0.0 if begun is None or last is None else max(0.0, last - begun)
            begun = time
        last = time
    return None if begun is None or last is None else total + max(0.0, last - begun)


def labels(runs: Sequence[RecordedRun]) -> list[str]:
    """The runs' names; for runs that share a name, their folders."""
    count = Counter(run.name for run in runs)
    return [run.name if count[run.name] == 1 else str(run.folder) for run in runs]


def kinds(runs: Sequence[RecordedRun]) -> list[Kind]:
    """How each run is related to the others.

    'continued' started from a checkpoint. A run without one is 'pretraining' if another run of the report continues it, or if
    none continues anything; otherwise it was trained from 'scratch' for comparison.
    """
    origins = [part for run in runs if run.origin for part in PurePosixPath(run.origin).parts]
    kinds: list[Kind] = []
    for run in runs:
        if run.origin:
            kinds.append("continued")
        elif not origins or {run.folder.resolve().name, run.name} & set(origins):
            kinds.append("pretraining")
        else:
            kinds.append("scratch")
    return kinds


def change_of(run: RecordedRun, role: str) -> Change:
    """The role's losses before and after the run, and the highest between; ``Change`` describes what may be missing."""
    curve = run.curve(role)
    losses, tokens = curve.losses[np.isfinite(curve.losses)], curve.tokens[np.isfinite(curve.losses)]
    if len(losses) == 0:
        return Change()
    # The last evaluation counts even if it is not finite, because a diverged run has no better one.
    after = float(curve.losses[-1]) if math.isfinite(curve.losses[-1]) else math.inf
    before = run.start_loss(role) if run.origin else None
    if before is None or not math.isfinite(before):
        return Change(after=after)
    peak = int(np.argmax(losses))
    rise = max(0.0, float(losses[peak]) - before)
    back = np.flatnonzero(losses[peak:] <= before)
    recovered = (float(tokens[peak + back[0]]) if len(back) else math.inf) if rise > 0 else None
    return Change(before, after, rise, float(tokens[peak]), recovered)


def tokens_to_reach(curve: Curve, target: float) -> float:
    """Tokens at which the loss is first at or below ``target``, linearly interpolated between evaluations.

    0 if it begins there, infinite if it never gets there. Ignores evaluations that are not finite.
    """
    kept = np.isfinite(curve.losses)
    tokens, losses = curve.tokens[kept], curve.losses[kept]
    below = np.flatnonzero(losses <= target)
    if len(below) == 0:
        return math.inf
    first = int(below[0])
    if first == 0:
        return float(tokens[0])
    share = (losses[first - 1] - target) / (losses[first - 1] - losses[first])
    return float(tokens[first - 1] + share * (tokens[first] - tokens[first - 1]))


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists to {'data.train.0.path': value}; empty ones are values."""
    if isinstance(config, dict) and config:
        items = [(str(key), value) for key, value in config.items()]
    elif isinstance(config, list) and any(isinstance(value, dict | list) for value in config):
        items = [(str(index), value) for index, value in enumerate(config)]
    else:
        return {prefix: config}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat


def same_value(one: Any, other: Any) -> bool:
    """Whether two values of a setting are equal; numbers may differ by rounding."""
    if isinstance(one, int | float) and isinstance(other, int | float) and not isinstance(one, bool | type(None)):
        return one == other or math.isclose(one, other, rel_tol=1e-5)
    return bool(one == other)


def same_length(one: float, other: float) -> bool:
    """Whether two numbers of tokens are close enough to compare the losses after them."""
    return abs(one - other) <= 0.01 * max(one, other)


def distinct_lengths(tokens: Sequence[float]) -> list[float]:
    """The distinct numbers of tokens, ascending; those within ``same_length`` are one."""
    found: list[float] = []
    for count in sorted(tokens):
        if not found or not same_length(found[-1], count):
            found.append(count)
    return found


def differences(runs: Sequence[RecordedRun]) -> dict[str, list[Any]]:
    """The config keys whose values differ between runs, each with its value in every run (``None`` if absent)."""
    flats = [flatten(run.config) if run.config else {} for run in runs]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    found: dict[str, list[Any]] = {}
    for key in keys:
        values = [flat.get(key) for flat in flats]
        if key not in _NOT_A_SETTING and not all(same_value(value, values[0]) for value in values):
            found[key] = values
    return found
