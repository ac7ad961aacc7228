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
from megarewarm.selection.embeddings import Embedded, Points, normalised
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


def check_count(asked: int | None, corpus: Corpus, kept: Mask) -> None:
    """Raise ``UserError`` as ``cluster_count``, of any file with documents that are ``kept``: before they are embedded."""
    for index, file in enumerate(corpus.files):
        if number := len(corpus.members(kept, index)):
            cluster_count(asked, number, file.path.stem)


def cluster_map(title: str, embedded: Embedded, rows: Numbers, clusters: Clusters, dropped: Mask) -> ClusterMap:
    """A map of up to 2,000 of the documents ``rows`` by their two principal components. ``dropped``: (len(rows),) bool."""
    drawn = np.unique(np.linspace(0, len(rows) - 1, min(_DRAWN, len(rows))).astype(np.int64))
    exact = embedded.points[rows[drawn]].astype(np.float64)
    exact -= exact.mean(0)
    with one_thread():
        _, _, axes = np.linalg.svd(exact, full_matrices=False)
    places = np.zeros((len(drawn), 2))
    for number, axis in enumerate(axes[:2]):
        places[:, number] = exact @ (axis * np.sign(axis[np.abs(axis).argmax()]))
    return ClusterMap(title, embedded.documents[rows[drawn]], places, clusters.labels[drawn], dropped[drawn])


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
