"""Activation checkpointing: what a layer computes again in the backward pass instead of keeping it (arXiv 1604.06174)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megarewarm.model.neox import MLP, DeferredResidual, Positions, add_deferred

Recompute = Literal["none", "selective", "full"]


def recompute(layer: nn.Module, what: Recompute) -> None:
    """Make ``layer`` keep everything; all but the GELU's output (selective: ffn values a token, no matrix product is
    repeated); or only its input (full: one more forward pass)."""
    if what == "full":
        whole = layer.forward

        def forward_whole(x: Tensor | DeferredResidual, positions: Positions) -> Tensor | DeferredResidual:
            # keep one tensor, not the three that a fused layer passes on
            result: Tensor | DeferredResidual = checkpoint(whole, add_deferred(x), positions, use_reentrant=False)
            return result

        layer.forward = forward_whole
    elif what == "selective":
        mlp = layer.mlp
        assert isinstance(mlp, MLP)

        def forward(x: Tensor) -> Tensor:
            # the recomputation stops once it has what the last product needs, before that product is computed
            result: Tensor = checkpoint(mlp.contract, mlp.expand(x), use_reentrant=False)
            return result

        mlp.forward = forward  # type: ignore[method-assign]
