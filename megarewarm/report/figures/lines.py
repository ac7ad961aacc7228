"""The look of each run in every figure of a report: its colour, marker, dashes and the label that fits beside a curve."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from megarewarm.record.run import RecordedRun
from megarewarm.report.figures import style
from megarewarm.report.numbers.runs import RunRow

_LONGEST = 30


@dataclasses.dataclass(frozen=True)
class Line:
    """A run as it is drawn. ``dashes`` is a matplotlib line style, solid for the first eight runs.

    ``seeds``: the runs of which ``run`` is the mean, whose range is drawn as a band; empty for a single run, which has a
    ``row``.
    """

    run: RecordedRun
    label: str
    colour: str
    marker: str
    dashes: str | tuple[float, tuple[float, ...]]
    seeds: tuple[RecordedRun, ...] = ()
    row: RunRow | None = None

    @property
    def is_pretraining(self) -> bool:
        return self.row is not None and self.row.kind == "pretraining"

    def legend_entry(self, axes: Axes, more: str = "") -> Line2D:
        """The entry of this line in a legend of ``axes``: its label and ``more``. It draws no point."""
        return axes.plot(
            [], [], color=self.colour, linestyle=self.dashes, marker=self.marker, markersize=5, label=self.label + more
        )[0]


def lines_of(runs: Sequence[RecordedRun], table: Sequence[RunRow]) -> list[Line]:
    """The lines of ``runs``, whose rows are ``table``, in order."""
    names = short_labels([row.label for row in table])
    return [
        Line(run, name, style.colour(index), style.marker(index), style.dashes(index), row=row)
        for index, (run, row, name) in enumerate(zip(runs, table, names, strict=True))
    ]


def short_labels(names: Sequence[str]) -> list[str]:
    """Names of at most 30 characters: if one is long, without their common prefix, then without their middles."""
    if len(names) > 1 and max(map(len, names)) > 20:
        same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
        shared = "".join(letters[0] for letters in same)
        cut = max(shared.rfind(separator) for separator in "_-./") + 1
        if cut > 4:
            names = [f"…{name[cut:]}" for name in names]
    return [name if len(name) <= _LONGEST else f"{name[:14]}…{name[-15:]}" for name in names]
