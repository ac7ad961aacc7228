"""Drops all but one of each group of near duplicates: MinHash signatures, candidates by bands (LSH), verified Jaccard.

A. Broder, "On the resemblance and containment of documents", 1997; Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets",
section 3.4. The signatures are rensa's; the similarity that decides is computed of the documents themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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

    Documents are a group where pairs connect them, so of a chain A~B~C one stays, also if A and C are less similar. The longest
    stays; of equally long ones that with the smallest digest.
    """

    name = "near"

    def __init__(self, similarity: float) -> None:
        self.similarity = similarity
        self._bands, self._rows = bands_for(similarity)
        self.words = (
            f"of documents whose sets of {GRAM}-grams of tokens have a Jaccard similarity of {similarity:g} or more, directly "
            f"or through others, keep the longest"
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
        return self._chosen(corpus, desk, documents, content, groups, sets)

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
        self, corpus: Corpus, desk: Desk, documents: Numbers, content: Numbers, parent: Numbers, sets: GramSets
    ) -> Chosen:
        grouped = np.flatnonzero(np.bincount(parent, minlength=len(documents))[parent] > 1)
        lengths = corpus.sizes[documents[grouped]]
        order = grouped[np.lexsort((content[grouped], -lengths, parent[grouped]))]
        first = np.concatenate([[True], parent[order][1:] != parent[order][:-1]])[: len(order)]
        best = order[first][np.cumsum(first) - 1] if len(order) else order
        dropped, because = documents[order[~first]], documents[best[~first]]
        scores = np.empty(len(dropped))
        total, done = corpus.bytes_of(dropped), 0
        for k, (one, other) in enumerate(zip(dropped.tolist(), because.tolist(), strict=True)):
            scores[k] = sets.jaccard(other, one)
            done += int(corpus.sizes[one])
            if not k % 256:
                desk.show("similarity to the kept", min(done, total), total)
        indirect = int((scores < self.similarity).sum())
        notes = [
            f"{int(first.sum()):,} groups, the largest of {int(np.bincount(parent).max()) if len(parent) else 0:,} documents"
        ]
        if indirect:
            notes.append(f"{indirect:,} are less similar to the kept document, and connected to it through others")
        by_number = np.argsort(dropped)
        return Chosen(dropped[by_number], because[by_number], scores[by_number], notes)


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
            found = RMinHash.digest_matrix_from_flat_token_hashes(grams, bounds.astype(np.uint64), PERMUTATIONS, _SEED)
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
