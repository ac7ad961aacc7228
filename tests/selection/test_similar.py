"""SemDeDup's rule against a double loop, prototypes against their formula, and what neither may depend on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarewarm.data.files.token_file import TokenFile, TokenFileWriter
from megarewarm.errors import UserError
from megarewarm.selection import semantic
from megarewarm.selection.clusters import Clusters, cluster
from megarewarm.selection.desk import Desk
from megarewarm.selection.embeddings import Embedder, normalised
from megarewarm.selection.opening import open_corpus
from megarewarm.selection.prototypes import Prototypes
from megarewarm.selection.scoring_model import ScoringModel
from megarewarm.selection.semantic import Semantic, likest_before
from megarewarm.selection.step import Chosen, Corpus, Step
from tests.selection.test_scoring_model import VOCABULARY, neox

QUIET = Desk(Path("nowhere"), {})
WIDTH = 12


def directions(ids: np.ndarray) -> np.ndarray:
    """A point for each first token, all but orthogonal; the second token moves it by a thousandth, the rest by nothing."""
    random = np.random.default_rng(int(ids[0]))
    point = random.normal(size=WIDTH)
    return point / np.linalg.norm(point) + 1e-3 * np.random.default_rng(1000 + int(ids[1])).normal(size=WIDTH)


class Meaning:
    """A model for ``Embedder`` whose points are ``directions``."""

    config = SimpleNamespace(hidden_size=WIDTH)
    identity = MappingProxyType[str, str]({})

    def check_reads(self, file: TokenFile) -> None:
        pass

    def embeddings(self, file: TokenFile, starts: np.ndarray, sizes: np.ndarray, progress: Callable[[int], None]) -> np.ndarray:
        return np.array([directions(file.read(*pair)) for pair in zip(starts.tolist(), sizes.tolist(), strict=True)])


def embedder() -> Embedder:
    meaning: Any = Meaning()
    return Embedder(meaning)


def corpus(prefix: Path, documents: list[list[int]]) -> Corpus:
    with TokenFileWriter(prefix, np.uint16) as writer:
        for ids in documents:
            writer.add_document(np.array(ids))
    return open_corpus([str(prefix)])


def chosen_by(step: Step, read: Corpus, work: Path, kept: np.ndarray | None = None) -> Chosen:
    return step.choose(read, np.ones(read.num_documents, bool) if kept is None else kept, Desk(work, {"at": str(work)}))


def double_loop(points: np.ndarray, labels: np.ndarray, likeness: np.ndarray) -> np.ndarray:
    """M_j of every point, one cluster and one pair after another, in float64."""
    most = np.full(len(points), -np.inf)
    for label in set(labels.tolist()):
        members = sorted(np.flatnonzero(labels == label), key=lambda row: (likeness[row], row))
        for j, row in enumerate(members):
            for i in range(j):
                most[row] = max(most[row], float(points[members[i]].astype(np.float64) @ points[row].astype(np.float64)))
    return most


@given(seed=st.integers(0, 10**6), count=st.integers(1, 40), clusters=st.integers(1, 5), block=st.integers(1, 9))
def test_the_rule_against_a_double_loop(seed: int, count: int, clusters: int, block: int) -> None:
    random = np.random.default_rng(seed)
    points = normalised(random.normal(size=(count + 3, 4)))
    rows = np.sort(random.choice(count + 3, count, replace=False))
    found = Clusters(random.integers(0, clusters, count), random.integers(0, 4, count).astype(np.float32), clusters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(semantic, "_BLOCK", block)
        most, which = likest_before(points, rows, found, QUIET)
    expected = double_loop(points[rows], found.labels, found.likeness)
    np.testing.assert_allclose(most, expected, atol=1e-6)
    there = np.isfinite(most)
    pairs = (points[rows][there] * points[rows][which[there]]).sum(1)
    np.testing.assert_allclose(most[there], pairs, atol=1e-6)
    assert (found.labels[there] == found.labels[which[there]]).all()


def test_the_chain() -> None:
    """A is like B and B like C, A is not like C: C goes, though B goes itself."""
    angles = np.array([0.0, 0.3, 0.6])
    points = normalised(np.stack([np.cos(angles), np.sin(angles)], 1))
    order = Clusters(np.zeros(3, np.int64), np.array([0.1, 0.2, 0.3], np.float32), 1)
    most, which = likest_before(points, np.arange(3), order, QUIET)
    eps = 1 - np.cos(0.4)
    assert (most > 1 - eps).tolist() == [False, True, True] and which[1:].tolist() == [0, 1]
    assert points[0] @ points[2] < 1 - eps


def grouped(groups: int, size: int, seed: int = 0) -> list[list[int]]:
    """``size`` documents of each meaning; the numbers after the first two make the contents differ."""
    random = np.random.default_rng(seed)
    documents = [[group, copy, *random.integers(0, 50, 5).tolist()] for group in range(groups) for copy in range(size)]
    return [documents[number] for number in random.permutation(len(documents))]


@pytest.mark.parametrize("clusters", [1, 2, 3])
def test_all_but_one_of_planted_duplicates_go(tmp_path: Path, clusters: int) -> None:
    """Whatever the number of clusters, as long as it puts them together: five copies of each of ten meanings."""
    read = corpus(tmp_path / "a", grouped(10, 5))
    chosen = chosen_by(Semantic(0.2, embedder(), clusters), read, tmp_path / "work")
    kept = np.setdiff1d(np.arange(50), chosen.dropped)
    meaning = np.array([read.content(document)[0] for document in range(50)])
    assert sorted(meaning[kept]) == list(range(10))
    assert (meaning[chosen.because] == meaning[chosen.dropped]).all() and (chosen.because != chosen.dropped).all()
    assert chosen.score.min() > 0.98 and "40 of 50 documents go" in chosen.notes[0]


def test_exact_duplicates_go_and_only_they(tmp_path: Path) -> None:
    documents = grouped(12, 1)
    read = corpus(tmp_path / "a", [*documents, documents[3], documents[3], documents[7]])
    chosen = chosen_by(Semantic(12 / 15, embedder(), 1), read, tmp_path / "work")
    kept = np.setdiff1d(np.arange(15), chosen.dropped)
    assert sorted(tuple(read.content(number)) for number in kept.tolist()) == sorted(map(tuple, documents))
    np.testing.assert_allclose(chosen.score, 1, atol=1e-6)


@pytest.mark.parametrize("make", [Semantic, Prototypes])
def test_a_share_of_one_keeps_all(tmp_path: Path, make: Any) -> None:
    read = corpus(tmp_path / "a", grouped(5, 4))
    assert not chosen_by(make(1.0, embedder()), read, tmp_path / "work").dropped.size


@pytest.mark.parametrize("make", [Semantic, Prototypes])
@pytest.mark.parametrize("share", [0.75, 0.5, 0.3])
def test_the_share_stays(tmp_path: Path, make: Any, share: float) -> None:
    read = corpus(tmp_path / "a", grouped(7, 5))
    chosen = chosen_by(make(share, embedder(), 3), read, tmp_path / "work")
    assert len(chosen.dropped) == 35 - int(np.ceil(35 * share)) and (np.diff(chosen.dropped) > 0).all()


def test_one_of_each_cluster_stays_and_a_note_says_so(tmp_path: Path) -> None:
    read = corpus(tmp_path / "a", grouped(6, 2))
    chosen = chosen_by(Semantic(0.1, embedder(), 6), read, tmp_path / "work")
    assert 1 <= 12 - len(chosen.dropped) <= 6
    assert f"not the {12 - 2} asked for" in chosen.notes[0] or len(chosen.dropped) == 10


def test_a_planted_far_cluster_survives(tmp_path: Path) -> None:
    """Of 40 documents of one meaning and 2 of another, both halves of D4 keep one of the others, alone in its cluster."""
    documents = [[1, copy, copy] for copy in range(40)] + [[2, 0, 0], [2, 1, 1]]
    read, shared = corpus(tmp_path / "a", documents), embedder()
    kept = np.ones(42, bool)
    for step in (Semantic(0.5, shared, 2), Prototypes(0.5, shared, 2)):
        kept[chosen_by(step, read, tmp_path / "work", kept.copy()).dropped] = False
    assert kept.sum() == 11 and any(read.content(document)[0] == 2 for document in np.flatnonzero(kept).tolist())


def test_the_most_prototypical_go(tmp_path: Path) -> None:
    read, shared = corpus(tmp_path / "a", grouped(9, 3)), embedder()
    kept = np.ones(27, bool)
    kept[::5] = False
    chosen = chosen_by(Prototypes(0.5, shared, 4), read, tmp_path / "work", kept)
    points = shared.embedded(read, kept, 0, QUIET)
    rows = points.rows_of(kept)
    found = cluster(points.points, rows, 4)
    distance = np.full(27, np.nan)
    for label in range(4):
        mine = found.labels == label
        assert (found.likeness[mine] <= 1 + 1e-6).all()
        distance[points.documents[rows[mine]]] = 1 - found.likeness[mine]
    left = np.setdiff1d(np.flatnonzero(kept), chosen.dropped)
    last = {label: distance[points.documents[rows[found.labels == label]]].max() for label in set(found.labels.tolist())}
    free = np.array([document for document in left if distance[document] not in last.values()])
    assert len(left) == int(np.ceil(kept.sum() / 2)) and distance[chosen.dropped].max() <= distance[free].min()
    np.testing.assert_allclose(chosen.score, 1 - distance[chosen.dropped], rtol=1e-6)
    assert [len(one.documents) for one in chosen.examples] == [3, 3]


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_input_makes_no_difference(tmp_path: Path, seed: int) -> None:
    """By a real model, with equal documents, with empty ones and ones of the end alone."""
    random = np.random.default_rng(7)
    texts = [random.integers(1, VOCABULARY, size).tolist() for size in random.integers(1, 90, 40)]
    documents = [[*ids, 0] for ids in [*texts, *texts[:6], [], []]] + [[]]
    neox(tmp_path / "model")
    left = []
    for name, order in (("a", np.arange(len(documents))), ("b", np.random.default_rng(seed).permutation(len(documents)))):
        opened = corpus(tmp_path / name, [documents[number] for number in order])
        read = Corpus(opened.files, (0,))
        shared = Embedder(ScoringModel(str(tmp_path / "model"), device="cpu"))
        kept = np.ones(len(documents), bool)
        for step in (Semantic(0.75, shared), Prototypes(0.5, shared)):
            kept[chosen_by(step, read, tmp_path / f"work{name}", kept.copy()).dropped] = False
        left.append(sorted(tuple(read.content(document)) for document in np.flatnonzero(kept).tolist()))
        assert kept.sum() == 18 + 3, "35 of 46, then 18 of them, and the three without content"
    assert left[0] == left[1]


def test_each_source_is_clustered_apart(tmp_path: Path) -> None:
    """A source of the same documents as another loses as many of them."""
    documents = grouped(6, 4)
    corpus(tmp_path / "a", documents)
    corpus(tmp_path / "b", documents)
    read = open_corpus([str(tmp_path / "a"), str(tmp_path / "b")])
    chosen = chosen_by(Semantic(0.25, embedder(), 1), read, tmp_path / "work")
    assert chosen.dropped[chosen.dropped < 24].tolist() == (chosen.dropped[chosen.dropped >= 24] - 24).tolist()
    assert len(chosen.maps) == 2 and len(chosen.notes) == 2 and len(chosen.dropped) == 36


def test_more_clusters_than_documents(tmp_path: Path) -> None:
    read = corpus(tmp_path / "a", grouped(2, 2))
    with pytest.raises(UserError, match="--clusters 5: expected at most 4, the documents of a that are left"):
        chosen_by(Semantic(0.5, embedder(), 5), read, tmp_path / "work")


def test_a_second_start_continues_where_the_first_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(2)
    read = corpus(tmp_path / "a", [random.integers(0, VOCABULARY, 30).tolist() for _ in range(20)])
    neox(tmp_path / "model")
    one_by_one = "megarewarm.selection.scoring_model.blocks"
    monkeypatch.setattr(one_by_one, lambda sizes, first: ((i, i + 1) for i in range(first, 20)))
    made: list[int] = []
    whole = ScoringModel.embeddings

    def counted(self: ScoringModel, *rest: Any) -> Any:
        if len(made) == 7:
            made.append(-1)
            raise KeyboardInterrupt
        made.append(0)
        return whole(self, *rest)

    monkeypatch.setattr(ScoringModel, "embeddings", counted)
    step = lambda: Semantic(0.5, Embedder(ScoringModel(str(tmp_path / "model"), device="cpu")))  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        chosen_by(step(), read, tmp_path / "work")
    stopped = chosen_by(step(), read, tmp_path / "work")
    assert made.count(0) == 20
    straight = Semantic(0.5, Embedder(ScoringModel(str(tmp_path / "model"), device="cpu")))
    again = straight.choose(read, np.ones(20, bool), Desk(tmp_path / "other", {"at": str(tmp_path / "other")}))
    assert stopped.dropped.tolist() == again.dropped.tolist() and stopped.score.tolist() == again.score.tolist()


def test_the_map_has_every_document_of_a_small_source(tmp_path: Path) -> None:
    read = corpus(tmp_path / "a", grouped(6, 4))
    chosen = chosen_by(Semantic(0.5, embedder(), 3), read, tmp_path / "work")
    (drawn,) = chosen.maps
    assert sorted(drawn.documents) == list(range(24)) and drawn.places.shape == (24, 2)
    assert sorted(drawn.documents[drawn.dropped]) == chosen.dropped.tolist()
    assert np.isfinite(drawn.places).all() and drawn.places.std(0).min() > 0


def test_points_without_length_stay_finite() -> None:
    assert normalised(np.zeros((2, 3))).tolist() == [[0, 0, 0]] * 2
    labels = cluster(np.ones((5, 3), np.float32), np.arange(5), 3).labels  # fewer distinct points than clusters
    assert len(set(labels.tolist())) == 1


def test_clusters_are_the_same_for_any_number_of_threads() -> None:
    from threadpoolctl import threadpool_limits

    points = normalised(np.random.default_rng(0).normal(size=(600, 16)))
    found = []
    for threads in (1, 2, 4):
        with threadpool_limits(threads):
            found.append(cluster(points, np.arange(600), 20))
    assert all((each.labels == found[0].labels).all() and (each.likeness == found[0].likeness).all() for each in found)
