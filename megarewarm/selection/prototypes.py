"""The second half of D4 (arXiv 2308.12284): of new clusters the most prototypical documents go (arXiv 2206.14486).

The clusters are those of what is left after de-duplication, as the authors found necessary (section 4.4.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megarewarm.selection.clusters import cluster, cluster_count, cluster_map
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
        self.words = f"keep {share:.4g} of the documents of each input: the most prototypical of each cluster go (D4)"

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"share": self._share, "clusters": self._clusters, **self._embedder.model.identity}

    def choose(self, corpus: Corpus, kept: Mask, desk: Desk) -> Chosen:
        parts: list[tuple[Numbers, Numbers, Points]] = []
        notes: list[str] = []
        maps: list[ClusterMap] = []
        examples: list[Examples] = []
        for index, file in enumerate(corpus.files):
            embedded = self._embedder.embedded(corpus, kept, index, desk)
            rows = embedded.rows_of(kept)
            if not len(rows):
                continue
            where = file.path.stem
            clusters = cluster(embedded.points, rows, cluster_count(self._clusters, len(rows), where))
            order = np.lexsort((np.arange(len(rows)), -clusters.likeness))
            gone = np.zeros(len(rows), bool)
            gone[order[: len(rows) - kept_count(self._share, len(rows))]] = True
            notes.append(f"{where}: {int(gone.sum()):,} of {len(rows):,} documents go, in {clusters.count:,} clusters")
            maps.append(cluster_map(f"{where}: documents by their meaning", embedded, rows, clusters, gone))
            for title, ends in (("most", order[:_EXAMPLES]), ("least", order[::-1][:_EXAMPLES])):
                scores = clusters.likeness[ends].astype(np.float64)
                examples.append(Examples(f"{where}: the {title} prototypical", embedded.documents[rows[ends]], scores))
            dropped = embedded.documents[rows[gone]]
            parts.append((dropped, np.full(len(dropped), -1), clusters.likeness[gone]))
        return collected(parts, notes, maps, examples=examples)
