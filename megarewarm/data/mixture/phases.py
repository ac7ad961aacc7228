"""Phases of a run: from some sample on, other sources or other shares. A source in two blends continues where it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megarewarm.config.data import Source
from megarewarm.data.mixture.blend import AnyBlend
from megarewarm.data.order.seen_samples import SeenSource
from megarewarm.errors import UserError

AnySource = Source | SeenSource


@dataclass(frozen=True)
class Phase:
    """From sample ``first`` of the run's data on, the ``sources`` are blended by their weights."""

    first: int
    sources: Sequence[AnySource]


def all_sources(phases: Sequence[Phase]) -> tuple[list[AnySource], list[npt.NDArray[np.int64]]]:
    """Every source once, in the order of first appearance, and for each phase the places of its own among them. A source is
    the same in two phases if nothing but its share differs. Raises ``UserError`` if its 'max_epochs' does."""
    found: list[AnySource] = []
    known: dict[str, list[int]] = {}  # the places of each stream in ``found``: several, if it is listed twice
    places: list[npt.NDArray[np.int64]] = []
    for phase in phases:
        mine = []
        met: Counter[str] = Counter()
        for source in phase.sources:
            stream = _stream(source)
            same = known.setdefault(stream, [])
            place = met[stream]
            met[stream] += 1
            if place == len(same):
                same.append(len(found))
                found.append(source)
            elif found[same[place]].max_epochs != source.max_epochs:
                raise UserError(
                    f"source '{source.name or source.path}' has max_epochs {found[same[place]].max_epochs} in one blend and "
                    f"{source.max_epochs} in another: give it the same in both"
                )
            mine.append(same[place])
        places.append(np.array(mine))
    return found, places


def _stream(source: AnySource) -> str:
    """The source in words, without what may differ between blends."""
    plain = source.with_weight(1.0)
    return repr(plain.model_copy(update={"max_epochs": None}) if isinstance(plain, Source) else plain)


class PhasedBlend:
    """One blend after another: blend k from position ``firsts[k]`` on, of the sources ``places[k]`` of all ``sources``."""

    def __init__(
        self, firsts: Sequence[int], blends: Sequence[AnyBlend], places: Sequence[npt.NDArray[np.int64]], sources: int
    ) -> None:
        self._firsts = np.array(firsts, np.int64)
        self._blends, self._places, self._sources = blends, places, sources
        before = np.zeros((len(blends) + 1, sources), np.int64)
        for k in range(len(blends) - 1):
            before[k + 1] = before[k] + self._spread(k, int(self._firsts[k + 1] - self._firsts[k]))
        self._before = before

    def locate(self, positions: npt.ArrayLike) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
        """(source, index within source) of positions >= 0, each of the shape of ``positions``."""
        where = np.asarray(positions, np.int64)
        phases = np.searchsorted(self._firsts, where, side="right") - 1
        source, index = np.empty(where.shape, np.int16), np.empty(where.shape, np.int64)
        for k in np.unique(phases).tolist():
            mine = phases == k
            local, within = self._blends[k].locate(where[mine] - self._firsts[k])
            source[mine] = self._places[k][local]
            index[mine] = within + self._before[k][source[mine]]
        return source, index

    def counts(self, positions: int) -> npt.NDArray[np.int64]:
        """How many of the first ``positions`` samples each source gives, (sources,)."""
        k = int(np.searchsorted(self._firsts, positions, side="right")) - 1
        return self._before[k] + self._spread(k, positions - int(self._firsts[k]))

    def _spread(self, k: int, positions: int) -> npt.NDArray[np.int64]:
        counts = np.zeros(self._sources, np.int64)
        counts[self._places[k]] = self._blends[k].counts(positions)
        return counts
