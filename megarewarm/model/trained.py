"""What of a model trains while the rest is frozen, and the names that a configuration gives its parts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from megarewarm.config.model import ModelConfig
from megarewarm.model.parameters import EMBEDDING, HEAD, Card, cards

Rows = tuple[int, int]
"""Rows of the vocabulary: (first, stop)."""
Trained = Mapping[str, Rows | None]
"""The parameters that train, by name; of an embedding or a head perhaps some rows only. None: all of its values."""

_LAYERS = re.compile(r"layers\s+(\d+)(?:\s*-\s*(\d+))?")
NEW_LAYERS, NEW_ROWS = "new_layers", "new_rows"
GROUPS = ("head", "embeddings", "norms", NEW_LAYERS, NEW_ROWS)


def chosen(only: str, model: ModelConfig, new_layers: Sequence[int], new_rows: Rows | None) -> dict[str, Rows | None]:
    """The parameters that one entry of ``optimizer.train.only`` names: one of ``GROUPS``, 'layers 3', 'layers 0-3', or a
    pattern of names with * and ?; none where layers go beyond the last. ``new_layers``, ``new_rows``: those of the start
    checkpoint."""
    every = cards(model)
    if only == NEW_ROWS:
        return {} if new_rows is None else {name: new_rows for name, card in every.items() if card.has_vocabulary}
    if only == NEW_LAYERS:
        return {name: None for name, card in every.items() if card.layer in new_layers}
    if only == "head":
        return {EMBEDDING if model.tie_embeddings else HEAD: None}
    if (found := _LAYERS.fullmatch(only)) is not None:
        layers = range(int(found[1]), int(found[2] or found[1]) + 1)
        within = layers.stop <= model.num_layers  # counted from 1 they would be others than those that were meant
        return {name: None for name, card in every.items() if within and card.layer is not None and card.layer in layers}
    role = {"embeddings": "embedding", "norms": "norm"}.get(only)
    return {name: None for name, card in every.items() if (card.role == role if role else fnmatchcase(name, only))}


def trained_values(card: Card, trained: Trained | None) -> int:
    """How many values of the parameter train."""
    if trained is None:
        return card.numel
    if card.name not in trained:
        return 0
    rows = trained[card.name]
    return card.numel if rows is None else (rows[1] - rows[0]) * card.numel // card.shape[0]


def count_trained(model: ModelConfig, trained: Trained | None) -> int:
    """How many values of the model train."""
    return sum(trained_values(card, trained) for card in cards(model).values())
