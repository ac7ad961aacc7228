"""Exact and near duplicates: planted ones, brute force, chains, and that the order of the input makes no difference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.selection.desk import Desk
from megarewarm.selection.digests import digests
from megarewarm.selection.exact import Exact
from megarewarm.selection.near import GRAM, Near, bands_for
from megarewarm.selection.ngrams import ngrams
from megarewarm.selection.opening import identity, open_corpus
from megarewarm.selection.pipeline import select
from megarewarm.selection.shared_grams import GramSets
from megarewarm.selection.step import Chosen, Corpus, Step
from tests.support.selection import changed, gram_set, jaccard, text, write_documents

IDS = st.lists(st.lists(st.integers(0, 3), max_size=9), min_size=1, max_size=12)


def chosen(place: Path, step: Step, *prefixes: str) -> tuple[Corpus, Chosen]:
    corpus = open_corpus(prefixes)
    return corpus, step.choose(corpus, np.ones(corpus.num_documents, bool), Desk(place / "work", identity(corpus)))


def kept_contents(place: Path, steps: list[Step], *prefixes: str) -> list[bytes]:
    corpus = open_corpus(prefixes)
    selection = select(corpus, steps, Desk(place / "work", identity(corpus)))
    return sorted(corpus.content(i).astype(np.int64).tobytes() for i in np.flatnonzero(selection.kept).tolist())


@settings(max_examples=80, deadline=None)
@given(documents=IDS, n=st.integers(1, 6), kind=st.sampled_from([np.uint16, np.int32]), high=st.booleans())
def test_grams_are_those_of_each_document(documents, n, kind, high) -> None:
    rows = [
        np.array(ids, np.int64) + (60_000 if high else 0) + (200_000 if high and kind is np.int32 else 0) for ids in documents
    ]
    sizes = np.array([len(row) for row in rows])
    flat = np.concatenate(rows).astype(kind)
    found, bounds = ngrams(flat, np.cumsum(sizes) - sizes, sizes, n)
    names: dict[tuple[int, ...], int] = {}
    for row, first, last in zip(rows, bounds[:-1], bounds[1:], strict=True):
        ids = row.tolist()
        grams = [tuple(ids[i : i + n]) for i in range(max(1, len(ids) - n + 1))] if ids else []
        assert len(grams) == last - first
        for gram, name in zip(grams, found[first:last].tolist(), strict=True):
            assert names.setdefault(gram, name) == name  # equal grams in any document
    assert len(set(names.values())) == len(names)  # and different ones differ


def test_one_of_each_group_of_equal_documents_stays(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    documents = [text(random, 20) for _ in range(50)]
    first = write_documents(tmp_path / "a", [*documents, documents[3], documents[3], [], [5]])
    wide = write_documents(tmp_path / "b", [documents[7], [5], [], text(random, 20)], np.int32)
    corpus, found = chosen(tmp_path, Exact(), first, wide)
    assert found.dropped.tolist() == [50, 51, 54, 55, 56]
    assert found.because.tolist() == [3, 3, 7, 53, 52] and (found.score == 1).all()
    assert len(np.unique(digests(corpus, Desk(tmp_path / "w", {})), axis=0)) == 53


def test_a_planted_near_duplicate_goes_and_a_far_one_stays(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    documents = [text(random) for _ in range(300)]
    near = [changed(documents[i], random, 3) for i in range(0, 100, 5)]
    far = [changed(documents[i], random, 60) for i in range(100, 200, 5)]
    longer = np.append(documents[250], text(random, 8))
    prefix = write_documents(tmp_path / "x", [*documents, *near, *far, longer, [], [], [1, 2], [1, 2], [1, 3]])
    corpus, found = chosen(tmp_path, Near(0.8), prefix)
    similar = [jaccard(documents[i], copy, GRAM) for i, copy in zip(range(0, 100, 5), near, strict=True)]
    assert min(similar) > 0.8 and max(jaccard(documents[i], far[(i - 100) // 5], GRAM) for i in range(100, 200, 5)) < 0.3
    pairs = {frozenset(pair) for pair in zip(found.dropped.tolist(), found.because.tolist(), strict=True)}
    planted = {frozenset((i, 300 + i // 5)) for i in range(0, 100, 5)} | {frozenset((250, 340)), frozenset((343, 344))}
    assert pairs == planted
    assert 250 in found.dropped and 340 not in found.dropped  # the longer one stays
    for one, other, score in zip(found.dropped.tolist(), found.because.tolist(), found.score.tolist(), strict=True):
        assert score == pytest.approx(jaccard(corpus.content(one), corpus.content(other), GRAM))


@settings(max_examples=60, deadline=None)
@given(one=st.lists(st.integers(0, 2), max_size=30), other=st.lists(st.integers(0, 2), max_size=30))
def test_jaccard_is_that_of_sets(tmp_path_factory, one, other) -> None:
    place = tmp_path_factory.mktemp("sets")
    corpus = open_corpus([write_documents(place / "x", [[7, *one], [7, *other]])])
    assert GramSets(corpus, 3).jaccard(0, 1) == pytest.approx(jaccard([7, *one], [7, *other], 3))
    assert GramSets(corpus, 3).of(0).size == len(gram_set([7, *one], 3))


def chain(random: np.random.Generator) -> list[np.ndarray]:
    """A, B, C of one length: neighbours have a Jaccard similarity above 0.8, A and C below."""
    a = text(random, 400)
    b, c = a.copy(), a.copy()
    b[10:30], c[10:30], c[300:320] = (new := text(random, 20)), new, text(random, 20)
    assert jaccard(a, b, GRAM) > 0.8 and jaccard(b, c, GRAM) > 0.8 and jaccard(a, c, GRAM) < 0.8
    return [a, b, c]


def test_of_a_chain_whatever_goes_is_like_what_stays(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    a, b, c = chain(random)
    _, found = chosen(tmp_path, Near(0.8), write_documents(tmp_path / "b", [a, np.append(b, 9), c]))
    assert found.dropped.tolist() == [0, 2] and found.because.tolist() == [1, 1]  # B is the longest
    _, found = chosen(tmp_path, Near(0.8), write_documents(tmp_path / "a", [np.append(a, 9), b, c]))
    assert found.dropped.tolist() == [1] and found.because.tolist() == [0]  # A is, and C is not like A
    _, found = chosen(tmp_path, Near(0.8), write_documents(tmp_path / "ac", [np.append(a, 9), b, np.append(c, 9)]))
    assert found.dropped.tolist() == [1] and (found.score >= 0.8).all()


def brute_force(documents: list[np.ndarray], digest_order: list[int], limit: float) -> set[int]:
    """What stays by the rule, from all pairs: the longest first, then by digest."""
    stays: list[int] = []
    for i in sorted(range(len(documents)), key=lambda i: (-len(documents[i]), digest_order[i])):
        if not any(jaccard(documents[i], documents[j], GRAM) >= limit for j in stays):
            stays.append(i)
    return set(stays)


@pytest.mark.parametrize("limit", [0.5, 0.8, 0.95])
def test_near_equals_the_double_loop(tmp_path: Path, limit: float) -> None:
    """Families of copies whose similarities are on both sides of the limit; a band may miss a pair that is just above it."""
    random = np.random.default_rng(3)
    documents = []
    for _ in range(12):
        base = text(random, int(random.integers(100, 300)))
        documents += [base, *(changed(base, random, int(random.integers(1, 40))) for _ in range(6))]
    prefix = write_documents(tmp_path / "x", documents)
    corpus, found = chosen(tmp_path, Near(limit), prefix)
    order = np.lexsort(np.asarray(digests(corpus, Desk(tmp_path / "w", {}))).T[::-1])
    expected = brute_force(documents, np.argsort(order).tolist(), limit)
    stays = set(range(len(documents))) - set(found.dropped.tolist())
    assert len(stays ^ expected) <= 2 and 0 < len(found.dropped) < len(documents) - 12
    assert (found.score >= limit).all()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_the_order_of_the_input_does_not_change_what_is_kept(tmp_path_factory, seed, data) -> None:
    random = np.random.default_rng(seed)
    base = [text(random, int(random.integers(0, 60))) for _ in range(6)]
    copies = [changed(ids, random, int(random.integers(0, len(ids) // 4 + 1))) for ids in base for _ in range(3)]
    documents = [*base, *copies, *chain(random), base[0]]
    order = data.draw(st.permutations(range(len(documents))))
    cut = data.draw(st.integers(1, len(documents) - 1))
    place = tmp_path_factory.mktemp("order")
    one = write_documents(place / "one", documents)
    parts = [write_documents(place / str(i), [documents[k] for k in part]) for i, part in enumerate((order[:cut], order[cut:]))]
    pipelines: list[list[Step]] = [[Exact()], [Near(0.6)], [Exact(), Near(0.6)]]
    for steps in pipelines:
        assert kept_contents(place, steps, one) == kept_contents(place, steps, *parts)


def test_a_pair_at_the_limit_meets_in_a_band_almost_surely() -> None:
    for limit in (0.1, 0.3, 0.5, 0.8, 0.9, 1.0):
        bands, rows = bands_for(limit)
        assert bands * rows <= 128 and 1 - (1 - limit**rows) ** bands >= 0.97
        assert 1 - (1 - limit ** (rows + 1)) ** (128 // (rows + 1)) < 0.97 or rows == 128
    assert bands_for(0.8) == (18, 7)
