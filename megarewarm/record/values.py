"""``values.jsonl`` of a run folder: a line for each training row that was valued, in the order of the steps.

A line holds ``step`` and ``position``, the row's place in the run's data; its ``source``, the ``path`` of the file, the
``sample`` of it and its ``parts``, [document, first token in it, tokens] each; ``values`` by validation set, in nats per token
of the set, positive where the row lowered its loss; and the row's ``tokens`` where it was among the highest or lowest so far.
A run that continues from a checkpoint cuts off the lines of later steps before it writes.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from megarewarm.errors import UserError
from megarewarm.record.layout import VALUES_FILE

SIGN = "positive values lowered the validation loss"


@dataclass(frozen=True)
class Part:
    """``tokens`` tokens of document number ``document`` of the row's file, from its token ``offset`` on."""

    document: int
    offset: int
    tokens: int


@dataclass(frozen=True)
class ValuedRow:
    """One line. ``tokens``: the row's ids, the last target included, None where they were not kept."""

    step: int
    position: int
    source: str
    path: str
    sample: int
    parts: list[Part]
    values: dict[str, float]
    tokens: list[int] | None = None

    def line(self) -> bytes:
        """The line of the file that holds it."""
        content: dict[str, Any] = {
            **{key: getattr(self, key) for key in ("step", "position", "source", "path", "sample")},
            "parts": [[part.document, part.offset, part.tokens] for part in self.parts],
            "values": self.values,
        }
        return orjson.dumps(content if self.tokens is None else {**content, "tokens": self.tokens}) + b"\n"


def row_of(line: bytes) -> ValuedRow | None:
    """The row that a line holds; None for a line that a crash has torn. Raises KeyError, TypeError or ValueError for a line
    that is JSON and no row."""
    try:
        content = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    values = {str(name): math.nan if value is None else float(value) for name, value in content["values"].items()}
    parts = [Part(*map(int, part)) for part in content["parts"]]
    numbers = {key: int(content[key]) for key in ("step", "position", "sample")}
    return ValuedRow(**numbers, source=str(content["source"]), path=str(content["path"]), parts=parts, values=values,
                     tokens=content.get("tokens"))  # fmt: skip


def rows_in(path: Path) -> Iterator[tuple[int, int, ValuedRow]]:
    """(the bytes at which its line begins and ends, the row) of each whole line. A torn last line is none. Raises
    ``UserError`` for any other line that is no row."""
    at = 0
    torn: int | None = None
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if torn is not None:
                raise UserError(f"{path}, line {torn}: not a JSON object: the file was damaged or edited")
            try:
                row = row_of(line)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(f"{path}, line {number}: a row with a missing or wrong {error}") from error
            if row is None or not line.endswith(b"\n"):
                torn = number
            else:
                yield at, at + len(line), row
            at += len(line)


class Values:
    """All valued rows of a run as columns: ``step``, ``position``, ``source`` (of ``sources``) and ``lengths`` (tokens), each
    (rows,) int64; ``values``: of each set (rows,) float64, NaN where a row was not valued against it. ``row`` reads one."""

    def __init__(self, folder: Path) -> None:
        """Of the run in ``folder``. Raises ``UserError`` without valued rows."""
        self.path = folder / VALUES_FILE
        if not self.path.is_file():
            raise UserError(f"{folder}: no {VALUES_FILE}: the run has valued no rows; give it 'valuation' (docs/worth.md)")
        names: dict[str, int] = {}
        columns = [array("q") for _ in range(5)]
        values: dict[str, array[float]] = {}
        for count, (begin, _, row) in enumerate(rows_in(self.path)):
            length = sum(part.tokens for part in row.parts) - 1
            source = names.setdefault(row.source, len(names))
            for column, number in zip(columns, (begin, row.step, row.position, source, length), strict=True):
                column.append(number)
            for name in (name for name in row.values if name not in values):
                values[name] = array("d", [np.nan] * count)
            for name, column_of_set in values.items():
                column_of_set.append(row.values.get(name, np.nan))
        self.sources, self.sets = list(names), list(values)
        self._begins, self.step, self.position, self.source, self.lengths = (np.array(column) for column in columns)
        self.values: dict[str, npt.NDArray[np.float64]] = {name: np.array(column) for name, column in values.items()}
        if not len(self.step):
            raise UserError(f"{self.path}: no valued rows yet")

    def __len__(self) -> int:
        return len(self.step)

    def row(self, number: int) -> ValuedRow:
        """Row ``number`` with its place and, where they were kept, its tokens."""
        with open(self.path, "rb") as file:
            file.seek(int(self._begins[number]))
            row = row_of(file.readline())
        assert row is not None
        return row
