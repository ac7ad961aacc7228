"""Best-fit packing of whole documents into rows (arXiv 2404.10830, section 3)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


def best_fit(sizes: Numbers, room: int) -> tuple[Numbers, int]:
    """(row of each of the items of ``sizes``, (n,), each 1 to ``room``; the number of rows): the longest item first, each into
    the row that it leaves least room in, or a new one.

    Of rows of equal room, the one that had it first; of equal items, the first. Items of one size are placed together: once an
    item lies in the fullest row that takes it, that row takes the next ones too, until it takes no more.
    """
    row_of = np.empty(len(sizes), np.int64)
    longest_first = np.argsort(-sizes, kind="stable")
    counts = np.bincount(sizes, minlength=room + 1)
    waiting: list[list[Numbers]] = [[] for _ in range(room + 1)]  # rows by the room that is left
    has_rows = np.zeros(room + 1, bool)
    rows = done = 0
    for size in range(room, 0, -1):
        items = longest_first[done : done + counts[size]]
        done += counts[size]
        while len(items):
            left = size + int(has_rows[size:].argmax())
            if not has_rows[left]:
                left = room
                new = -(-len(items) // (room // size))
                waiting[left].append(np.arange(rows, rows + new))
                rows += new
            each = left // size
            able = np.concatenate(waiting[left])
            taken = able[: -(-len(items) // each)]
            waiting[left] = [able[len(taken) :]] if len(taken) < len(able) else []
            has_rows[left] = bool(waiting[left])
            count = min(len(items), len(taken) * each)
            row_of[items[:count]] = np.repeat(taken, each)[:count]
            items = items[count:]
            last = count - (len(taken) - 1) * each  # items in the last of the rows
            for group, rest in ((taken[:-1], left - each * size), (taken[-1:], left - last * size)):
                if rest and len(group):
                    waiting[rest].append(group)
                    has_rows[rest] = True
    return row_of, rows
