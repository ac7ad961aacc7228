"""K-means of documents' points on the sphere, the same on every machine: scikit-learn's MiniBatchKMeans on one thread.

As faiss does, it is trained on a sample where there are many documents, which bounds its memory; then every document joins the
centroid it is most like.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from megarewarm.errors import UserError
from megarewarm.selection.desk import Desk
from megarewarm.selection.embeddings import Embedded, Embedder, Points, normalised
from megarewarm.selection.step import ClusterMap, Corpus, Mask, Numbers

SEED = 20240313
_PER_CLUSTER = 256  # points per centroid that K-means is trained on at most, as in faiss
_TRAINING = 2**30  # bytes of points that K-means is trained on at most
_BLOCK = 2**13  # points at a time
_DRAWN = 2000


@dataclass(frozen=True)
class Clusters:
    """``labels``: the cluster of each point, (m,); ``likeness``: its cosine with the cluster's centroid, (m,) fp32; ``count``:
    of clusters that were asked for."""

    labels: Numbers
    likeness: Points
    count: int


def cluster(points: Points, rows: Numbers, count: int) -> Clusters:
    """The points of ``rows`` in ``count`` clusters. Needs scikit-learn."""
    with one_thread():
        centroids = _centroids(points, rows, count)
        labels, likeness = np.empty(len(rows), np.int64), np.empty(len(rows), np.float32)
        for first in range(0, len(rows), _BLOCK):
            part = slice(first, first + _BLOCK)
            similar = points[rows[part]] @ centroids.T
            labels[part] = similar.argmax(1)
            likeness[part] = similar.max(1)
    return Clusters(labels, likeness, count)


def cluster_count(asked: int | None, documents: int, where: str) -> int:
    """``asked``, or the square root of the number of documents. Raises ``UserError`` for more clusters than documents."""
    if asked is not None and asked > documents:
        raise UserError(f"--clusters {asked}: expected at most {documents:,}, the documents of {where} that are left")
    return asked or max(1, round(documents**0.5))


@dataclass(frozen=True)
class ClusteredFile:
    """The documents of a file that are kept, in ``clusters``: those of the ``rows`` of ``embedded``. ``name``: for people."""

    name: str
    embedded: Embedded
    rows: Numbers
    clusters: Clusters

    def drawn(self, dropped: Mask) -> ClusterMap:
        """A map of up to 2,000 of them by their two principal components. ``dropped``: (len(rows),) bool."""
        rows = self.rows
        some = np.unique(np.linspace(0, len(rows) - 1, min(_DRAWN, len(rows))).astype(np.int64))
        exact = self.embedded.points[rows[some]].astype(np.float64)
        exact -= exact.mean(0)
        with one_thread():
            _, _, axes = np.linalg.svd(exact, full_matrices=False)
        places = np.zeros((len(some), 2))
        for number, axis in enumerate(axes[:2]):
            places[:, number] = exact @ (axis * np.sign(axis[np.abs(axis).argmax()]))
        title = f"{self.name}: documents by their states"
        return ClusterMap(title, self.embedded.documents[rows[some]], places, self.clusters.labels[some], dropped[some])


def clustered(corpus: Corpus, kept: Mask, desk: Desk, embedder: Embedder, asked: int | None) -> Iterator[ClusteredFile]:
    """Each file that has ``kept`` documents, clustered for itself in ``asked`` clusters, or as ``cluster_count`` chooses.
    Raises ``UserError`` as that does, of any file before the first is embedded."""
    for index, file in enumerate(corpus.files):
        if number := len(corpus.members(kept, index)):
            cluster_count(asked, number, file.path.stem)
    for index, file in enumerate(corpus.files):
        embedded = embedder.embedded(corpus, kept, index, desk)
        rows, name = embedded.rows_of(kept), file.path.stem
        if len(rows):
            yield ClusteredFile(name, embedded, rows, cluster(embedded.points, rows, cluster_count(asked, len(rows), name)))


@contextmanager
def one_thread() -> Iterator[None]:
    """numpy and scikit-learn on one thread, whose sums have one order on every machine."""
    import sklearn  # noqa: F401 - names the missing extra; threadpoolctl is a part of its installation
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        yield


def _centroids(points: Points, rows: Numbers, count: int) -> Points:
    """(count, h) of length 1."""
    from sklearn.cluster import MiniBatchKMeans

    most = max(count, min(count * _PER_CLUSTER, _TRAINING // (4 * points.shape[1])))
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(SEED).choice(rows, most, replace=False))
    means = MiniBatchKMeans(count, max_iter=25, batch_size=4096, n_init=3, random_state=SEED, compute_labels=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct points than clusters: some stay empty
        means.fit(points[rows])
    return normalised(means.cluster_centers_)
