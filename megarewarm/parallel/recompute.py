"""Activation checkpointing: what a layer does not keep for the backward pass and computes again (arXiv 1604.06174)."""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megarewarm.model.neox import MLP

Recompute = Literal["none", "selective", "full"]


def recompute(layer: nn.Module, what: Recompute) -> None:
    """Make ``layer`` forget: nothing; the GELU's output (selective: ffn values a token, no matrix product is repeated); or
    everything but its input (full: one forward pass more)."""
    if what == "full":
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    elif what == "selective":
        mlp = layer.mlp
        assert isinstance(mlp, MLP)

        # the recomputation stops as soon as it has what the last product had kept, before that product is computed
        def activate_and_project(x: Tensor) -> Tensor:
            return mlp.dense_4h_to_h(F.gelu(x, approximate=mlp.approximate))

        def forward(x: Tensor) -> Tensor:
            return checkpoint(activate_and_project, mlp.dense_h_to_4h(x), use_reentrant=False)

        mlp.forward = forward  # type: ignore[method-assign]
