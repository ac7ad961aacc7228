"""Drops near duplicates, so that one of them stays: MinHash signatures, candidates by bands (LSH), verified Jaccard.

A. Broder, "On the resemblance and containment of documents", 1997; Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets",
section 3.4. The signatures are rensa's; the similarity that decides is computed of the documents themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from megarewarm.selection.desk import Desk, kept_key
from megarewarm.selection.digests import digests, ranks
from megarewarm.selection.groups import Groups
from megarewarm.selection.ngrams import Hashes, ngrams
from megarewarm.selection.shared_grams import GramSets
from megarewarm.selection.step import Chosen, Corpus, Mask, Numbers

GRAM = 5
PERMUTATIONS = 128
_SEED = 1234
_FOUND = 0.97  # of the pairs that are as similar as the threshold, at least so many meet in a band
_DOUBT = 0.15  # by so much an estimate may be below the threshold and is looked at: 4 standard deviations of 128 values
_ROWS = 2**12  # signatures that are lists of numbers at a time, 5 KB each
_PAIRS = 2**13  # signatures compared at a time


def bands_for(similarity: float, permutations: int = PERMUTATIONS) -> tuple[int, int]:
    """(bands, rows of each): the longest rows with which a pair of this Jaccard similarity s meets in one of the bands with a
    chance of 1 - (1 - s**rows)**bands >= 0.97; rows of 1 where none has it."""
    for rows in range(permutations, 0, -1):
        bands = permutations // rows
        if 1 - (1 - similarity**rows) ** bands >= _FOUND:
            return bands, rows
    return permutations, 1


class Near:
    """``similarity``: the Jaccard similarity of the sets of 5-grams of tokens from which on two documents are near duplicates.

    The longest document comes first, of equally long ones that with the smallest digest; a document goes if it is similar to
    one that stays. So of a chain A~B~C, with A and C less similar, B alone stays if it is the longest, else both A and C, and
    whatever goes has a near duplicate that is kept.
    """

    name = "near"

    def __init__(self, similarity: float) -> None:
        self.similarity = similarity
        self._bands, self._rows = bands_for(similarity)
        self.words = (
            f"drop documents whose set of {GRAM}-grams of tokens has a Jaccard similarity of {similarity:g} or more with "
            f"that of one that stays, the longest first"
        )
        self.settings: Mapping[str, Any] = {
            "similarity": similarity,
            "gram": GRAM,
            "permutations": PERMUTATIONS,
            "bands": self._bands,
            "rows": self._rows,
            "seed": _SEED,
        }

    def choose(self, corpus: Corpus, kept: Mask, desk: Desk) -> Chosen:
        documents = np.flatnonzero(kept)
        content = _content_ranks(corpus, desk, documents)
        signatures = _signatures(corpus, desk, kept, documents)
        sets = GramSets(corpus, GRAM)
        groups = self._groups(corpus, desk, kept, documents, content, signatures, sets)
        return self._chosen(corpus, desk, documents, content, signatures, groups, sets)

    def _groups(
        self,
        corpus: Corpus,
        desk: Desk,
        kept: Mask,
        documents: Numbers,
        content: Numbers,
        signatures: npt.NDArray[np.uint32],
        sets: GramSets,
    ) -> Numbers:
        """For each of ``documents`` the first of its group, (n,); one band after another, each on the disk when it is done."""
        total = corpus.bytes_of(documents)
        parent: Numbers = np.arange(len(documents))
        for band in range(self._bands):
            said = {**self.settings, "kept": kept_key(kept), "band": band}

            def make(_: int, band: int = band, before: Numbers = parent) -> Iterator[Numbers]:
                desk.show("comparing candidates", band * total // self._bands, total)
                groups = Groups(np.array(before))
                for bucket in _buckets(signatures[:, band * self._rows : (band + 1) * self._rows], content, groups):
                    self._compare(bucket, documents, signatures, sets, groups)
                yield groups.flatten()

            parent = desk.rows("groups", said, (len(documents),), np.int64, make)
        desk.show("comparing candidates", total, total)
        return parent

    def _compare(
        self, bucket: Numbers, documents: Numbers, signatures: npt.NDArray[np.uint32], sets: GramSets, groups: Groups
    ) -> None:
        """Join those of a ``bucket`` that are similar: all pairs but those that are connected already."""
        for i in range(len(bucket) - 1):
            pivot, others = int(bucket[i]), bucket[i + 1 :]
            others = others[groups.roots(others) != groups.root(pivot)]
            if not len(others):
                return  # those after the pivot are of its group
            for first in range(0, len(others), _PAIRS):
                part = others[first : first + _PAIRS]
                estimates = (signatures[part] == signatures[pivot]).mean(1)
                for other in part[estimates >= self.similarity - _DOUBT].tolist():
                    if groups.root(other) != groups.root(pivot):
                        found = sets.jaccard(int(documents[pivot]), int(documents[other]))
                        if found >= self.similarity:
                            groups.join(pivot, other)

    def _chosen(
        self,
        corpus: Corpus,
        desk: Desk,
        documents: Numbers,
        content: Numbers,
        signatures: npt.NDArray[np.uint32],
        parent: Numbers,
        sets: GramSets,
    ) -> Chosen:
        """Of each group the longest first: each goes that is similar to one that stays."""
        grouped = np.flatnonzero(np.bincount(parent, minlength=len(documents))[parent] > 1)
        order = grouped[np.lexsort((content[grouped], -corpus.sizes[documents[grouped]], parent[grouped]))]
        bounds = np.flatnonzero(np.concatenate([[True], parent[order][1:] != parent[order][:-1], [True]]))
        found: list[tuple[int, int, float]] = []
        total, done = corpus.bytes_of(documents[order]), 0
        for begin, end in pairwise(bounds.tolist()):
            group = order[begin:end]
            found += self._similar_to_kept(documents[group], signatures[group], sets)
            done += corpus.bytes_of(np.sort(documents[group]))
            desk.show("choosing of each group", done, total)
        found.sort()
        dropped, because = (np.array([row[k] for row in found], np.int64) for k in (0, 1))
        notes = [f"{len(bounds) - 1:,} groups, the largest of {int(np.diff(bounds).max()):,} documents"] if len(order) else []
        return Chosen(dropped, because, np.array([row[2] for row in found], np.float64), notes)

    def _similar_to_kept(
        self, group: Numbers, signatures: npt.NDArray[np.uint32], sets: GramSets
    ) -> list[tuple[int, int, float]]:
        """(document, the kept one it is most similar to, Jaccard) of those of a ``group`` that go."""
        found = []
        stays = [0]
        for i in range(1, len(group)):
            estimates = (signatures[stays] == signatures[i]).mean(1)
            near = [stays[k] for k in np.flatnonzero(estimates >= self.similarity - _DOUBT)]
            best = max(((sets.jaccard(int(group[k]), int(group[i])), -k) for k in near), default=(0.0, 0))
            if best[0] >= self.similarity:
                found.append((int(group[i]), int(group[-best[1]]), best[0]))
            else:
                stays.append(i)
        return found


def _content_ranks(corpus: Corpus, desk: Desk, documents: Numbers) -> Numbers:
    return ranks(digests(corpus, desk), documents)


def _signatures(corpus: Corpus, desk: Desk, kept: Mask, documents: Numbers) -> npt.NDArray[np.uint32]:
    """(documents, 128) uint32, on the disk; all ones for an empty document, which is like none."""
    from rensa import RMinHash

    total = corpus.bytes_of(documents)

    def make(first: int) -> Iterator[npt.NDArray[np.uint32]]:
        done = corpus.bytes_of(documents[:first])
        for block in corpus.blocks(documents[first:]):
            grams, bounds = ngrams(block.ids, block.starts, block.sizes, GRAM)
            for begin in range(0, len(bounds) - 1, _ROWS):
                part = bounds[begin : begin + _ROWS + 1]
                mine, ends = grams[part[0] : part[-1]], (part - part[0]).astype(np.uint64)
                found = RMinHash.digest_matrix_from_flat_token_hashes(mine, ends, PERMUTATIONS, _SEED)
                yield np.array(found.to_rows(), np.uint32).reshape(-1, PERMUTATIONS)
            done += block.ids.nbytes
            desk.show("MinHash signatures", done, total)

    said = {
        "what": "rensa RMinHash",
        "algorithm": RMinHash.ALGORITHM_VERSION,
        "gram": GRAM,
        "seed": _SEED,
        "kept": kept_key(kept),
    }
    return desk.rows("signatures", said, (len(documents), PERMUTATIONS), np.uint32, make)


def _buckets(columns: npt.NDArray[np.uint32], content: Numbers, groups: Groups) -> Iterator[Numbers]:
    """The documents whose ``columns``, (n, rows), are equal, where there are several that are not one group yet; in the order
    of their content. Empty documents are in none."""
    keys = _band_keys(columns)
    order = np.lexsort((content, keys))
    keys = keys[order]
    bounds = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1], [True]]))
    if len(keys) < 2:
        return
    roots = groups.flatten()[order]
    mixed = np.minimum.reduceat(roots, bounds[:-1]) != np.maximum.reduceat(roots, bounds[:-1])
    for begin, end in zip(bounds[:-1][mixed].tolist(), bounds[1:][mixed].tolist(), strict=True):
        if (columns[order[begin]] != np.iinfo(np.uint32).max).any():
            yield order[begin:end]


def _band_keys(columns: npt.NDArray[np.uint32]) -> Hashes:
    """A 64-bit hash of each row."""
    count, width = columns.shape
    keys = np.empty(count, np.uint64)
    for first in range(0, count, 2**18):
        part = np.ascontiguousarray(columns[first : first + 2**18])
        starts = np.arange(len(part)) * width
        keys[first : first + len(part)] = ngrams(part.reshape(-1), starts, np.full(len(part), width), width)[0]
    return keys
