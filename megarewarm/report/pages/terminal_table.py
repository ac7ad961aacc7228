"""The report's table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from megarewarm.record.run import RecordedRun
from megarewarm.report.numbers.measure import MEASURES
from megarewarm.report.numbers.runs import rows, unit_sentences


def summary_table(runs: Sequence[RecordedRun]) -> Table:
    """The report's table for the terminal: one row per run, losses in the runs' unit, 80 columns wide."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column("run", overflow="fold", min_width=10)
    columns = [measure.terminal for measure in MEASURES if measure.terminal is not None]
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    if told := unit_sentences(runs[0].unit):
        table.caption, table.caption_justify = told[0], "left"
    for row in rows(runs):
        table.add_row(row.label, *(text(row) for _, text in columns))
    return table
