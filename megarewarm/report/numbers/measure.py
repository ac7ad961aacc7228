"""The measures of a report, one row each: pages, terminal and files all show the numbers of a run from this table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megarewarm.record.events import CHANGES, TaskEvent
from megarewarm.record.run import DOWNSTREAM, UPSTREAM
from megarewarm.report.numbers.runs import Change, RunRow, perplexity
from megarewarm.report.numbers.tasks import TaskKey, task_labels
from megarewarm.spelling import DASH, MINUS, loss_text, rate_text, signed_text, tokens_text

Number = float | None


@dataclass(frozen=True)
class Measure:
    """One number of a run.

    ``of`` computes it, None if the run has none; ``of`` is None itself if the number depends on other runs (``arms.py``).
    ``heading`` under ``group`` is its column in the pages; a measure without one is in the files only. ``text`` formats its
    numbers; ``infinite`` stands for an infinite one; ``small`` is written below it in a page of runs. ``headline``: bold, and
    last in a file of runs. ``spread``: whether its deviation over seeds is shown.

    Where it appears: ``runs``: the page of runs; ``arms``: everything of experiments, under ``key``; ``file``: its key in
    table.csv and table.json of runs; ``terminal``: (heading, text of a run) of its column in the terminal.
    """

    key: str
    of: Callable[[RunRow], Number] | None
    heading: str = ""
    group: str = ""
    text: Callable[[float], str] = loss_text
    infinite: str = ""
    small: Callable[[RunRow], str | None] | None = None
    headline: bool = False
    spread: bool = True
    runs: bool = False
    arms: bool = True
    file: str | None = None
    terminal: tuple[str, Callable[[RunRow], str]] | None = None

    def show(self, value: Number) -> str:
        """``value`` as text; a dash for none."""
        return DASH if value is None else self.text(value)


def _ends(change: Change) -> str:
    if change.before is None or not math.isfinite(change.before):
        return loss_text(change.after)
    return f"{loss_text(change.before)} → {loss_text(change.after)}"


def _perplexity_text(loss: Number, unit: str) -> str | None:
    value = perplexity(loss, unit)
    return None if value is None or not math.isfinite(value) else f"{value:,.0f}" if value >= 999.5 else f"{value:.2f}"


def _peak_text(change: Change) -> str | None:
    return f"at {tokens_text(change.peak_tokens or 0)}" if change.peak_rise else None


def _saved_text(tokens: float) -> str:
    return f"{MINUS if tokens < 0 else ''}{tokens_text(abs(tokens))}"


def _average(row: RunRow) -> Number:
    up, down = row.upstream.after, row.downstream.after
    return None if up is None or down is None else (up + down) / 2


def _of_role(role: str, change: Callable[[RunRow], Change], headline: Measure) -> list[Measure]:
    """The losses of the ``role`` before and after, and in between."""
    group = f"{role.capitalize()} loss"
    return [
        Measure(
            f"{role}_before",
            lambda row: change(row).before,
            "Before",
            group,
            small=lambda row: _perplexity_text(change(row).before, row.unit),
            runs=True,
            file=f"{role}_before",
        ),
        Measure(
            f"{role}_after",
            lambda row: change(row).after,
            "After",
            group,
            infinite="diverged",
            small=lambda row: _perplexity_text(change(row).after, row.unit),
            runs=True,
            file=f"{role}_after",
            terminal=(role, lambda row: _ends(change(row))),
        ),
        *(
            Measure(f"{role}_perplexity_{end}", of, arms=False, file=f"{role}_perplexity_{end}")
            for end, of in (
                ("before", lambda row: perplexity(change(row).before, row.unit)),
                ("after", lambda row: perplexity(change(row).after, row.unit)),
            )
        ),
        headline,
        Measure(
            f"{role}_rise",
            lambda row: change(row).peak_rise,
            "Highest rise",
            group,
            text=signed_text,
            small=lambda row: _peak_text(change(row)),
            runs=True,
            file=f"{role}_peak_rise",
        ),
        Measure(f"{role}_rise_tokens", lambda row: change(row).peak_tokens if change(row).peak_rise else None),
        Measure(f"{role}_peak_rise_tokens", lambda row: change(row).peak_tokens, arms=False, file=f"{role}_peak_rise_tokens"),
        Measure(
            f"{role}_recovered_tokens",
            lambda row: change(row).recovered_tokens,
            "Recovered at",
            group,
            text=tokens_text,
            infinite="not recovered",
        ),
    ]


def _headline(key: str, of: Callable[[RunRow], Number], group: str, word: str) -> Measure:
    terminal = word, lambda row: signed_text(of(row))
    return Measure(key, of, key.capitalize(), group, text=signed_text, headline=True, runs=True, file=key, terminal=terminal)


MEASURES: list[Measure] = [
    Measure(
        "peak_lr",
        lambda row: row.peak_lr,
        "Peak LR",
        text=rate_text,
        spread=False,
        runs=True,
        file="peak_lr",
        terminal=("peak LR", lambda row: rate_text(row.peak_lr)),
    ),
    Measure("steps", lambda row: row.steps, "Steps", text="{:,}".format, arms=False, runs=True, file="steps"),
    Measure(
        "tokens",
        lambda row: row.tokens,
        "Tokens",
        text=tokens_text,
        spread=False,
        runs=True,
        file="tokens",
        terminal=("tokens", lambda row: tokens_text(row.tokens)),
    ),
    *_of_role(
        UPSTREAM, lambda row: row.upstream, _headline("forgetting", lambda row: row.forgetting, "Upstream loss", "forgot")
    ),
    *_of_role(
        DOWNSTREAM,
        lambda row: row.downstream,
        _headline("adaptation", lambda row: row.adaptation, "Downstream loss", "learned"),
    ),
    Measure("average_after", _average, "Average of both", infinite="diverged"),
    *(
        Measure(
            f"{role}_merged",
            lambda row, role=role: row.merged.get(role),  # type: ignore[misc]
            role.capitalize(),
            "Decay by merging",
            infinite="diverged",
            runs=True,
            file=f"{role}_merged",
        )
        for role in (UPSTREAM, DOWNSTREAM)
    ),
    Measure("tokens_per_second", lambda row: row.tokens_per_second, file="tokens_per_second"),
    Measure("wall_time", lambda row: row.wall_time, file="wall_time"),
    Measure("tokens_saved", None, "Tokens saved", text=_saved_text, infinite="never"),
]
"""In the order of columns. ``average_after`` is the mean of the two final losses, ``*_merged`` are those of the average of the
run's last weights (``checkpoint.average``). Tokens are those of the stage, ``wall_time``
is in seconds.

Infinite: a final loss that diverged, a rise without recovery (``*_recovered_tokens``), and minus infinity for ``tokens_saved``
of an arm that never reached the loss of the arm from scratch.
"""


def measures_of(rows: Iterable[RunRow]) -> list[Measure]:
    """``MEASURES``, and those of each task that one of ``rows`` was tested on."""
    labels = task_labels(key for row in rows for key in row.tests)
    return [*MEASURES, *(measure for key, label in labels.items() for measure in _of_task(key, label))]


def _of_task(key: TaskKey, label: str) -> list[Measure]:
    """Accuracies of the first test and of the last, the items lost and won between, and what only files have."""

    def made(name: str, of: Callable[[TaskEvent], Number], heading: str = "", text: str = "{:.1f}", at: int = -1) -> Measure:
        of_row = lambda row: of(row.tests[key][at]) if key in row.tests else None  # noqa: E731 - it goes into a table
        told = f"task_{label}_{name}"
        return Measure(told, of_row, heading, f"Task {label}", text=text.format, file=told)

    def items(change: str) -> Callable[[TaskEvent], Number]:
        return lambda test: None if (share := getattr(test, change)) is None else round(share * test.items, 6)

    return [
        made("before", lambda test: test.accuracy, "First", "{:.1%}", at=0),
        made("after", lambda test: test.accuracy, "Last", "{:.1%}"),
        *(made(change, items(change), change.capitalize() if change in ("lost", "won") else "") for change in CHANGES),
        made("items", lambda test: test.items),
        made("chance", lambda test: test.chance),
        made("bits_per_byte", lambda test: test.bits_per_byte),
    ]


def run_measures(row: RunRow, measures: Sequence[Measure]) -> dict[str, float]:
    """Those of ``measures`` that depend on no other run, by their keys in an experiment; without those that the run lacks."""
    values = {measure.key: measure.of(row) for measure in measures if measure.arms and measure.of is not None}
    return {key: value for key, value in values.items() if value is not None}


def file_row(row: RunRow, measures: Sequence[Measure]) -> dict[str, Any]:
    """One run as one level of keys and JSON values, for table.csv and table.json."""
    flat: dict[str, Any] = {"run": row.label, "kind": row.kind, "from": row.origin}
    for measure in sorted(measures, key=lambda measure: measure.headline):
        if measure.file is not None and measure.of is not None:
            flat[measure.file] = measure.of(row)
    return flat | {"tokens": round(row.tokens), "diverged": row.diverged}
