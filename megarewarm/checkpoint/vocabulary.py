"""A model with another number of vocabulary rows: cut, or filled up with rows of zeros."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megarewarm.checkpoint.weights import Description, Weights
from megarewarm.config.model import ModelConfig
from megarewarm.model.parameters import EMBEDDING, HEAD


class ResizedVocabulary:
    """``weights`` with ``rows`` rows in the embedding and the head. Rows that are added are zero, so their logits are 0."""

    def __init__(self, weights: Weights, rows: int) -> None:
        self.where = weights.where
        self._weights, self._rows = weights, rows

    def describe(self) -> Mapping[str, Description]:
        found = dict(self._weights.describe())
        for name in (EMBEDDING, HEAD):
            if name in found:
                found[name] = Description((self._rows, *found[name].shape[1:]), found[name].dtype, found[name].place)
        return found

    def read(self, name: str) -> Tensor:
        tensor = self._weights.read(name)
        if name not in (EMBEDDING, HEAD):
            return tensor
        if self._rows <= len(tensor):
            return tensor[: self._rows]
        resized = torch.zeros(self._rows, *tensor.shape[1:], dtype=tensor.dtype)
        resized[: len(tensor)] = tensor
        return resized


def resize(weights: Weights, config: ModelConfig, rows: int) -> tuple[Weights, ModelConfig, str | None]:
    """``weights`` and ``config`` with a vocabulary of ``rows``, and a note that says what was cut or added, if anything."""
    before = config.vocab_size
    if rows == before:
        return weights, config, None
    what = f"the last {before - rows:,} were cut" if rows < before else f"{rows - before:,} of zeros were added"
    changed = config.model_copy(update={"vocab_size": rows})
    return ResizedVocabulary(weights, rows), changed, f"vocabulary: {before:,} rows became {rows:,}, {what}"
