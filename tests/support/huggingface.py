"""A whole model from a Hugging Face folder, as the readers of single tensors give it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megarewarm.checkpoint.foreign.huggingface import HuggingFaceWeights
from megarewarm.checkpoint.weights import expected_shapes, fill
from megarewarm.model.transformer import Transformer


def load_weights(folder: str | Path, model: Transformer) -> None:
    """Fill every parameter of ``model`` from the weights in ``folder``, cast to the parameter's dtype.

    Rows of a padded vocabulary become zero. Otherwise as ``weights.fill``.
    """
    parameters = dict(model.named_parameters())

    def take(name: str, tensor: Tensor) -> None:
        parameters[name][: len(tensor)].copy_(tensor)
        parameters[name][len(tensor) :].zero_()

    with torch.no_grad():
        fill(HuggingFaceWeights(folder), expected_shapes(model.config), take)
