"""What valued rows amount to: each source's value against each validation set, and how well the step's change was predicted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megarewarm.record.run import RecordedRun
from megarewarm.record.values import Values


@dataclass(frozen=True)
class Value:
    """Nats per token of the set by which a million tokens lower its loss, and the standard error of that over rows, NaN for a
    single row."""

    per_million: float
    error: float

    @property
    def is_harmful(self) -> bool:
        """Whether it is below zero by two standard errors."""
        return self.per_million < -2 * self.error


@dataclass(frozen=True)
class SourceValue:
    """A source's ``rows`` that were valued, their ``tokens``, and their value against each set."""

    source: str
    rows: int
    tokens: int
    values: dict[str, Value]


def source_values(values: Values, against: Sequence[str]) -> list[SourceValue]:
    """Each source's values against the sets ``against``, and under '' against all of them together, the most harmful first."""
    found = []
    for i, source in enumerate(values.sources):
        mine = values.source == i
        tokens, each = values.lengths[mine], {name: values.values[name][mine] for name in against}
        each[""] = np.sum([each[name] for name in against], axis=0)
        of = {name: _value(column, tokens) for name, column in each.items()}
        found.append(SourceValue(source, int(mine.sum()), int(tokens.sum()), of))
    return sorted(found, key=lambda one: one.values[""].per_million)


def _value(values: NDArray[np.float64], tokens: NDArray[np.int64]) -> Value:
    kept = np.isfinite(values)
    values, tokens = values[kept], tokens[kept]
    if not len(values):
        return Value(math.nan, math.nan)
    error = float(values.std(ddof=1)) * math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Value(float(values.sum()) / int(tokens.sum()) * 1e6, error / int(tokens.sum()) * 1e6)


@dataclass(frozen=True)
class Prediction:
    """By how much each valued step was to lower the loss of a set, and did: (steps,) each, in nats per token."""

    predicted: NDArray[np.float64]
    measured: NDArray[np.float64]

    @property
    def r_squared(self) -> float | None:
        """The share of the measured changes' variance that the predicted ones explain, as they are, without a fitted line;
        None for less than three steps."""
        spread = float(np.square(self.measured - self.measured.mean()).sum()) if len(self.measured) > 2 else 0.0
        return 1 - float(np.square(self.measured - self.predicted).sum()) / spread if spread else None


def predictions(run: RecordedRun) -> dict[str, Prediction]:
    """Of each set that the run's rows were valued against."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for event in run.events:
        if event["event"] == "value":
            both = event.get("predicted"), event.get("measured")
            if all(isinstance(number, int | float) for number in both):
                pairs.setdefault(str(event["name"]), []).append(both)  # type: ignore[arg-type]
    return {name: Prediction(*np.array(found, np.float64).T) for name, found in pairs.items()}


def sums_by_source(run: RecordedRun, name: str) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Against set ``name``, of each source: tokens of the run, and the sum of the values of its rows so far."""
    lines = [event for event in run.events if event["event"] == "value" and event.get("name") == name]
    sources = list(dict.fromkeys(source for line in lines for source in line["sources"]))
    found = {}
    for source in sources:
        points = [(line["tokens"] - run.tokens_before, line["sources"][source]) for line in lines if source in line["sources"]]
        tokens, sums = np.array(points, np.float64).T
        found[source] = (tokens, sums)
    return found
