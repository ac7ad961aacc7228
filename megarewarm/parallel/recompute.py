"""Activation checkpointing: what a layer does not keep for the backward pass and computes again (arXiv 1604.06174)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megarewarm.model.neox import MLP, DeferredResidual, Positions, add_deferred

Recompute = Literal["none", "selective", "full"]


def recompute(layer: nn.Module, what: Recompute) -> None:
    """Make ``layer`` forget: nothing; the GELU's output (selective: ffn values a token, no matrix product is repeated); or
    everything but its input (full: one forward pass more)."""
    if what == "full":
        whole = layer.forward

        def forward_whole(x: Tensor | DeferredResidual, positions: Positions) -> Tensor | DeferredResidual:
            # one tensor to keep, not the three that a fused layer hands on
            result: Tensor | DeferredResidual = checkpoint(whole, add_deferred(x), positions, use_reentrant=False)
            return result

        layer.forward = forward_whole
    elif what == "selective":
        mlp = layer.mlp
        assert isinstance(mlp, MLP)

        def forward(x: Tensor) -> Tensor:
            # the recomputation stops as soon as it has what the last product had kept, before that product is computed
            result: Tensor = checkpoint(mlp.contract, mlp.expand(x), use_reentrant=False)
            return result

        mlp.forward = forward  # type: ignore[method-assign]
