"""The curve and the table in the terminal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from megarewarm.record.run import read_runs
from megarewarm.report.figures.terminal import draw_curve
from megarewarm.report.pages.terminal_table import summary_table
from tests.support.report_runs import write_arms


def dots(text: str, margin: int, lines: int) -> np.ndarray:
    """(4 lines, 2 columns) bool of the braille dots, decoded by the order that Unicode gives them."""
    order = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (3, 0), (3, 1)]
    rows = text.split("\n")[:lines]
    width = max(map(len, rows)) - margin
    grid = np.zeros((4 * lines, 2 * width), dtype=bool)
    for y, row in enumerate(rows):
        for x, character in enumerate(row[margin:]):
            code = ord(character) - 0x2800
            for bit, (down, right) in enumerate(order):
                if 0 <= code < 256 and code >> bit & 1:
                    grid[4 * y + down, 2 * x + right] = True
    return grid


def test_dots_are_where_the_curve_is() -> None:
    x = np.arange(1001)
    text = draw_curve(x, x / 1000, 60, 15)
    lines = text.split("\n")
    margin = lines[0].index("┤") + 1
    grid = dots(text, margin, 13)
    columns = grid.shape[1]
    for column in range(0, columns, 7):
        height = (grid.shape[0] - 1 - np.flatnonzero(grid[:, column])) / (grid.shape[0] - 1)
        assert len(height) and abs(height.mean() - column / (columns - 1)) < 0.03
    assert max(map(len, lines)) <= 60 and len(lines) == 15


def test_axes_tell_the_range() -> None:
    text = draw_curve([1, 500, 2_000_000], [0.0, 3e-4, 3e-5], 60, 14, y_label="learning rate", x_label="step")
    lines = text.split("\n")
    assert "learning rate" in lines[0] and lines[1].lstrip().startswith("3e-4 ┤")
    assert any(line.lstrip().startswith("1.5e-4 ┤") for line in lines) and any(
        line.lstrip().startswith("0 ┤") for line in lines
    )
    assert lines[-1].split() == ["1", "step", "2M"]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=300), st.integers(40, 120), st.integers(6, 30), st.booleans())
def test_fits_whatever_the_curve(values: list[float], width: int, height: int, unicode: bool) -> None:
    text = draw_curve(np.arange(len(values)), values, width, height, unicode=unicode)
    assert len(text.split("\n")) <= height and max(map(len, text.split("\n"))) <= width
    assert unicode or text.isascii()


def test_a_peak_between_two_columns_is_not_lost() -> None:
    values = np.zeros(10_000)
    values[5_001] = 1.0
    text = draw_curve(np.arange(10_000), values, 50, 12)
    assert any(0x2800 < ord(character) < 0x2900 for character in text.split("\n")[0])


def test_refusals() -> None:
    with pytest.raises(ValueError, match="two points"):
        draw_curve([1], [1])
    with pytest.raises(ValueError, match="two points"):
        draw_curve([1, 2], [1, np.nan])
    with pytest.raises(ValueError, match="too few"):
        draw_curve([1, 2], [1, 2], width=12)


def test_table_fits_a_terminal_of_80_columns(tmp_path: Path) -> None:
    runs = read_runs(write_arms(tmp_path, steps=40))
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table(runs))
    text = console.export_text()
    assert max(len(line) for line in text.split("\n")) <= 80 and "…" not in text
    for run in runs:
        assert any(line.split()[:1] == [run.name] for line in text.split("\n"))
