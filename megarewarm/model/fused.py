"""Fused operations, applied to a model from outside: they replace parts by ones that compute the same in fewer passes.

A norm of a sum is one operation with the sum, if a layer passes its parts on instead of adding them: with the parallel
residual of GPT-NeoX x, attention and MLP (``DeferredResidual``), in Llama's layers x and the MLP (``DeferredSum``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from megarewarm_kernels import bias_gelu, residual_norms
from megarewarm_kernels.apex import fused_layer_norm
from torch import Tensor, nn
from torch.nn import functional as F

from megarewarm.model.neox import MLP, Attention, DeferredResidual, Layer
from megarewarm.model.positions import Positions


@dataclass(frozen=True)
class Operations:
    """The implementation of each operation. ``loss``: the ``kernel`` of linear_cross_entropy; ``norms``: triton, apex or
    reference; ``gelu``: triton or reference; ``attention``: a backend of megarewarm_kernels.attention.choose."""

    norms: str = "reference"
    gelu: str = "reference"
    attention: str = "auto"
    loss: str = "auto"
    deterministic: bool = False


def fuse(layers: Iterable[nn.Module], operations: Operations) -> None:
    """Replace parts of ``layers``, which may be divided over tensor ranks. Parameters and their names stay."""
    for layer in layers:
        if operations.norms == "triton" and type(layer) is Layer and layer.parallel:
            layer.__class__ = FusedLayer
        for module in layer.modules():
            if isinstance(module, Attention):
                module.backend, module.deterministic = operations.attention, operations.deterministic
            elif type(module) is MLP and operations.gelu == "triton" and type(module.dense_h_to_4h) is nn.Linear:
                module.__class__ = FusedMLP
            elif type(module) is nn.LayerNorm and operations.norms == "apex":
                module.__class__ = ApexLayerNorm


class FusedLayer(Layer):
    """A layer with the parallel residual that adds the parts of the one before, and passes on its own parts. Under autocast
    the stream has autocast's dtype."""

    def forward(self, x: Tensor | DeferredResidual, positions: Positions) -> DeferredResidual:  # type: ignore[override]
        parts: tuple[Any, Any, Any] = x if isinstance(x, DeferredResidual) else (_at_work(x), None, None)
        one, other = self.input_layernorm, self.post_attention_layernorm
        total, first, second = residual_norms(*parts, one.weight, one.bias, other.weight, other.bias, eps=one.eps)
        return DeferredResidual(total, self.attention(first, positions), self.mlp(second))


class FusedMLP(MLP):
    """The bias of the first linear layer belongs to the GELU."""

    def expand(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense_h_to_4h.weight)

    def contract(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(bias_gelu(x, self.dense_h_to_4h.bias, approximate=self.approximate))


class ApexLayerNorm(nn.LayerNorm):
    """NVIDIA apex's LayerNorm."""

    def forward(self, x: Tensor) -> Tensor:
        function = fused_layer_norm()
        assert function is not None, "chosen only where it is there"
        result: Tensor = function(_at_work(x), self.weight, self.bias, self.normalized_shape, self.eps)
        return result


def _at_work(x: Tensor) -> Tensor:
    """``x`` in autocast's dtype under autocast."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
