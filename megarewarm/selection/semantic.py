"""SemDeDup (arXiv 2303.09540): documents that are too like another of their cluster go.

In each cluster, sorted from the document least like the centroid on, document j goes if M_j = max over i < j of e_i . e_j is
above 1 - eps. It is the rule of the authors' program: i counts even if it goes itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from megarewarm.selection.clusters import Clusters, clustered, one_thread
from megarewarm.selection.desk import Desk
from megarewarm.selection.embeddings import Embedder, Points
from megarewarm.selection.step import Chosen, ClusterMap, Corpus, Mask, Numbers

_BLOCK = 2**12  # points whose similarities to as many others are in memory


class Semantic:
    """Keeps ``share`` of each file's documents: eps is chosen so. Clusters are those of one file."""

    name = "semantic"

    def __init__(self, share: float, embedder: Embedder, clusters: int | None = None) -> None:
        self._share, self._embedder, self._clusters = share, embedder, clusters
        self.words = f"keep {100 * share:.4g} % of each input's documents: those most like another in a cluster go (SemDeDup)"

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"share": self._share, "clusters": self._clusters, **self._embedder.model.identity}

    def choose(self, corpus: Corpus, kept: Mask, desk: Desk) -> Chosen:
        parts: list[tuple[Numbers, Numbers, Points]] = []
        notes: list[str] = []
        maps: list[ClusterMap] = []
        for file in clustered(corpus, kept, desk, self._embedder, self._clusters):
            rows, clusters, documents = file.rows, file.clusters, file.embedded.documents
            most, which = likest_before(file.embedded.points, rows, clusters, desk)
            gone, note = _gone(most, self._share)
            notes.append(f"{file.name}: {note}, in {clusters.count:,} clusters")
            maps.append(file.drawn(gone))
            because = documents[rows[which[gone]]]
            parts.append((documents[rows[gone]], because, most[gone]))
        return collected(parts, notes, maps)


def likest_before(points: Points, rows: Numbers, clusters: Clusters, desk: Desk) -> tuple[Points, Numbers]:
    """(M_j (m,) fp32, -inf for the first of a cluster; the index among ``rows`` of the document it is of, (m,))."""
    most, which = np.full(len(rows), -np.inf, np.float32), np.zeros(len(rows), np.int64)
    # least like the centroid first; equal ones in the order of their contents
    order = np.lexsort((np.arange(len(rows)), clusters.likeness, clusters.labels))
    bounds = np.searchsorted(clusters.labels[order], np.arange(clusters.count + 1))
    total = int((np.diff(bounds) ** 2).sum())
    done = 0
    with one_thread():
        for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            desk.show("comparing", done, total)
            _compare(points, rows, order[begin:end], most, which)
            done += (end - begin) ** 2
    return most, which


def _compare(points: Points, rows: Numbers, members: Numbers, most: Points, which: Numbers) -> None:
    """Fill in ``most`` and ``which`` for the ``members`` of a cluster, which are in its order, block by block."""
    for first in range(0, len(members), _BLOCK):
        mine = members[first : first + _BLOCK]
        own = points[rows[mine]]
        for before in range(0, first + 1, _BLOCK):
            others = members[before : before + _BLOCK]
            similar = own @ (own if before == first else points[rows[others]]).T
            if before == first:
                similar[np.triu_indices(len(mine))] = -np.inf
            best = similar.argmax(1)
            found = similar[np.arange(len(mine)), best]
            better = found > most[mine]
            most[mine[better]], which[mine[better]] = found[better], others[best[better]]


def kept_count(share: float, number: int) -> int:
    """ceil(share x number), but for rounding."""
    return math.ceil(share * number - 1e-9)


def _gone(most: Points, share: float) -> tuple[Mask, str]:
    """(which go, (m,) bool; a note): those of the largest M, ties in the order of contents. The first of a cluster stays."""
    wanted, gone = len(most) - kept_count(share, len(most)), np.zeros(len(most), bool)
    chosen = np.lexsort((np.arange(len(most)), -most))[:wanted]
    chosen = chosen[np.isfinite(most[chosen])]
    gone[chosen] = True
    if not wanted:
        return gone, f"all {len(most):,} documents stay"
    note = f"{len(chosen):,} of {len(most):,} documents go"
    if len(chosen):
        limit = float(most[chosen].min())
        note += f", of a cosine of {limit:.4f} or more with another (eps {1 - limit:.4f})"
    if len(chosen) < wanted:
        note += f"; not the {wanted:,} asked for, since one of each cluster stays"
    return gone, note


def collected(parts: list[tuple[Numbers, Numbers, Points]], notes: list[str], maps: list[ClusterMap], **more: Any) -> Chosen:
    """The parts (dropped, because, score) of several files as one choice, by document."""
    dropped: Numbers = np.concatenate([part[0] for part in parts] or [np.empty(0, np.int64)])
    because: Numbers = np.concatenate([part[1] for part in parts] or [np.empty(0, np.int64)])
    score = np.concatenate([part[2] for part in parts] or [np.empty(0, np.float32)]).astype(np.float64)
    order = np.argsort(dropped)
    return Chosen(dropped[order], because[order], score[order], notes, maps, **more)
