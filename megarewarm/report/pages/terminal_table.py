"""The report's table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.table import Table

from megarewarm.record.run import Run
from megarewarm.report.numbers.runs import rows
from megarewarm.spelling import loss_text, rate_text, signed_text, tokens_text


def summary_table(runs: Sequence[Run]) -> Table:
    """The report's table for the terminal: one row per run, losses in nats per token, 80 columns wide."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column("run", overflow="fold", min_width=10)
    for name in ("peak LR", "tokens", "upstream", "forgot", "downstream", "learned"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows(runs):
        table.add_row(
            row.label,
            rate_text(row.peak_lr),
            tokens_text(row.tokens),
            _ends(row.upstream.before, row.upstream.after),
            signed_text(row.forgetting),
            _ends(row.downstream.before, row.downstream.after),
            signed_text(row.adaptation),
        )
    return table


def _ends(before: float | None, after: float | None) -> str:
    if before is None or not math.isfinite(before):
        return loss_text(after)
    return f"{loss_text(before)} → {loss_text(after)}"
