"""The tables of a report as files: CSV and JSON."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """``row`` with None for numbers that are not finite."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def write_json(path: Path, rows: Sequence[dict[str, Any]], indent: int = 1) -> None:
    """``rows`` as JSON; numbers that are not finite are null."""
    path.write_text(json.dumps([finite(row) for row in rows], indent=indent, allow_nan=False) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """``rows`` as CSV, a column for each key that any of them has; an infinite number is the word 'inf'."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
