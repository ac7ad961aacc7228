"""The writer of values.jsonl, with what its lines amount to: sums by source and set, and the extremes among them."""

from __future__ import annotations

import heapq
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megarewarm.errors import UserError
from megarewarm.record.values import ValuedRow, rows_in


class RowValues:
    """Appends rows to the file at ``path``; all that is known of earlier rows is read from it. ``sums``: of the values of each
    set by source; ``counts``: their numbers; ``rows``: of all. ``keep``: how many highest and lowest of each set keep their
    tokens."""

    def __init__(self, path: Path, keep: int) -> None:
        self._path, self._keep = path, keep
        self._clear()

    def _clear(self) -> None:
        self.rows = 0
        self.counts: dict[str, dict[str, int]] = {}
        self.sums: dict[str, dict[str, float]] = {}
        self._extremes: dict[tuple[str, int], list[float]] = {}

    def cut(self, step: int) -> None:
        """Drop the rows of the steps after ``step``, and read the others. Raises ``UserError`` for a file that is damaged, or
        that can't be written."""
        self._clear()
        if not self._path.exists():
            return
        end = 0
        for begin, after, row in rows_in(self._path):
            end = begin if row.step > step else after
            if row.step > step:
                break
            self._add(row)
        try:
            os.truncate(self._path, end)
        except OSError as error:
            raise self._refused(error) from error

    def is_extreme(self, row: ValuedRow) -> bool:
        """Whether a set's value is among the ``keep`` highest or lowest so far."""
        return bool(self._keep) and any(
            len(held := self._extremes.get((name, sign), [])) < self._keep or sign * value > held[0]
            for name, value in row.values.items()
            for sign in (1, -1)
        )

    def append(self, rows: Sequence[ValuedRow]) -> None:
        """Add ``rows``, all or none of them; those that are extreme have their tokens, others need none. Raises
        ``UserError`` if the disk refuses."""
        lines = []
        for row in rows:
            lines.append((row if self.is_extreme(row) else replace(row, tokens=None)).line())
            self._add(row)
        try:
            with open(self._path, "ab", buffering=0) as file:
                begin = file.tell()
                try:
                    whole, done = b"".join(lines), 0
                    while done < len(whole):  # a disk that is nearly full takes a part of it
                        done += file.write(whole[done:])
                except OSError:
                    file.truncate(begin)
                    raise
        except OSError as error:
            raise self._refused(error) from error

    def _add(self, row: ValuedRow) -> None:
        self.rows += 1
        for name, value in row.values.items():
            sums, counts = self.sums.setdefault(name, {}), self.counts.setdefault(name, {})
            sums[row.source] = sums.get(row.source, 0.0) + value
            counts[row.source] = counts.get(row.source, 0) + 1
            for sign in (1, -1) if self._keep else ():
                held = self._extremes.setdefault((name, sign), [])
                heapq.heappush(held, sign * value)
                if len(held) > self._keep:
                    heapq.heappop(held)

    def _refused(self, error: OSError) -> UserError:
        return UserError(
            f"{self._path}: can't be written ({error.strerror or error}); make room and run the same command again: it "
            f"continues from the newest checkpoint"
        )
