"""Drops all but one of the documents whose contents are equal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megarewarm.selection.desk import Desk
from megarewarm.selection.digests import digests
from megarewarm.selection.step import Chosen, Corpus, Mask


class Exact:
    """Of equal documents the first stays: which one makes no difference to what is kept."""

    name = "exact"
    words = "drop all but one of the documents with equal tokens"
    settings: Mapping[str, Any] = {}

    def choose(self, corpus: Corpus, kept: Mask, desk: Desk) -> Chosen:
        documents = np.flatnonzero(kept)
        found = np.asarray(digests(corpus, desk)[documents])
        order = np.lexsort((found[:, 1], found[:, 0]))  # stable, so the first of equal ones is the first in the input
        same = np.concatenate([[False], (found[order][1:] == found[order][:-1]).all(1)])[: len(order)]
        group_first = np.maximum.accumulate(np.where(same, 0, np.arange(len(order)))) if len(order) else order
        dropped, because = documents[order[same]], documents[order[group_first[same]]]
        by_number = np.argsort(dropped)
        return Chosen(dropped[by_number], because[by_number], np.ones(len(dropped)))
