"""The second half of D4 (arXiv 2308.12284): of new clusters the most prototypical documents go (arXiv 2206.14486).

The clusters are those of what is left after de-duplication, as the authors found necessary (section 4.4.2). Other than there,
the least prototypical of each cluster stays: a document alone in its cluster is its own centroid and would be the first to go.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megarewarm.selection.clusters import clustered
from megarewarm.selection.desk import Desk
from megarewarm.selection.embeddings import Embedder, Points
from megarewarm.selection.semantic import collected, kept_count
from megarewarm.selection.step import Chosen, ClusterMap, Corpus, Examples, Mask, Numbers

_EXAMPLES = 3


class Prototypes:
    """Keeps ``share`` of each file's documents: those with the largest distance 1 - e . c to their centroid c."""

    name = "diverse"

    def __init__(self, share: float, embedder: Embedder, clusters: int | None = None) -> None:
        self._share, self._embedder, self._clusters = share, embedder, clusters
        self.words = f"keep {100 * share:.4g} % of each input's documents: the most prototypical of their clusters go (D4)"

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"share": self._share, "clusters": self._clusters, **self._embedder.model.identity}

    def choose(self, corpus: Corpus, kept: Mask, desk: Desk) -> Chosen:
        parts: list[tuple[Numbers, Numbers, Points]] = []
        notes: list[str] = []
        maps: list[ClusterMap] = []
        examples: list[Examples] = []
        for file in clustered(corpus, kept, desk, self._embedder, self._clusters):
            rows, clusters, documents = file.rows, file.clusters, file.embedded.documents
            order = np.lexsort((np.arange(len(rows)), -clusters.likeness))
            wanted = len(rows) - kept_count(self._share, len(rows))
            chosen = order[~_last_of_clusters(clusters.labels[order])][:wanted]
            gone = np.zeros(len(rows), bool)
            gone[chosen] = True
            note = f"{file.name}: {len(chosen):,} of {len(rows):,} documents go, in {clusters.count:,} clusters"
            notes.append(note + (f"; not the {wanted:,} asked for, since one of each stays" if len(chosen) < wanted else ""))
            maps.append(file.drawn(gone))
            for title, ends in (("most", order[:_EXAMPLES]), ("least", order[::-1][:_EXAMPLES])):
                scores = clusters.likeness[ends].astype(np.float64)
                examples.append(Examples(f"{file.name}: the {title} prototypical", documents[rows[ends]], scores))
            dropped = documents[rows[gone]]
            parts.append((dropped, np.full(len(dropped), -1), clusters.likeness[gone]))
        return collected(parts, notes, maps, examples=examples)


def _last_of_clusters(labels: Numbers) -> Mask:
    """Whether each of ``labels`` (n,) is the last one equal to it."""
    last = np.zeros(len(labels), bool)
    last[len(labels) - 1 - np.unique(labels[::-1], return_index=True)[1]] = True
    return last
