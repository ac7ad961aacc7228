"""Activation checkpointing: what a layer computes again in the backward pass instead of keeping it (arXiv 1604.06174)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megarewarm.model import llama, neox
from megarewarm.model.fused_llama import FusedGatedMLP
from megarewarm.model.fused_neox import GeluProductsMLP
from megarewarm.model.positions import Positions
from megarewarm.model.transformer import Stream, add_deferred

Recompute = Literal["none", "selective", "full"]


def recompute(layer: nn.Module, what: Recompute) -> None:
    """Make ``layer`` keep everything; all but the activation's output (selective: ffn values a token, no matrix product is
    repeated); or only its input (full: one more forward pass). Fused Llama-like layers never keep the activation's output."""
    if what == "full":
        whole = layer.forward
        if isinstance(layer.mlp, FusedGatedMLP):
            layer.mlp.checkpointed = True

        def forward_whole(x: Stream, positions: Positions) -> Stream:
            # keep one tensor, not the several that a fused layer passes on
            result: Stream = checkpoint(whole, add_deferred(x), positions, use_reentrant=False)
            return result

        layer.forward = forward_whole
    elif what == "selective" and not isinstance(layer.mlp, FusedGatedMLP):
        mlp = layer.mlp
        assert isinstance(mlp, neox.MLP | llama.GatedMLP)
        if isinstance(mlp, GeluProductsMLP):
            mlp.keeps_result = False
        contract = mlp.contract

        def contract_again(x: Tensor) -> Tensor:
            # the recomputation stops once it has what the last product needs, before that product is computed
            result: Tensor = checkpoint(contract, x, use_reentrant=False)
            return result

        mlp.contract = contract_again  # type: ignore[method-assign]
