"""Parts of GPT-NeoX's layers that compute the same in fewer passes."""

from __future__ import annotations

from typing import Any

from megarewarm_kernels import bias_gelu, residual_norms
from megarewarm_kernels.apex import fused_layer_norm
from torch import Tensor, nn

from megarewarm.model.autocast import at_work
from megarewarm.model.given_bias import waiting_bias
from megarewarm.model.low_weights import product
from megarewarm.model.neox import MLP, DeferredResidual, Layer
from megarewarm.model.positions import Positions


class FusedLayer(Layer):
    """A layer with the parallel residual that adds the parts of the one before, and passes on its own parts. Under autocast
    the stream has autocast's dtype."""

    def forward(self, x: Tensor | DeferredResidual, positions: Positions) -> DeferredResidual:  # type: ignore[override]
        parts: tuple[Any, Any, Any] = x[:3] if isinstance(x, DeferredResidual) else (at_work(x), None, None)
        waiting = x.biases if isinstance(x, DeferredResidual) else (None, None)
        one, other = self.input_layernorm, self.post_attention_layernorm
        total, first, second = residual_norms(
            *parts, one.weight, one.bias, other.weight, other.bias, eps=one.eps, biases=waiting
        )
        biases = waiting_bias(self.attention.dense), waiting_bias(self.mlp.dense_4h_to_h)
        return DeferredResidual(total, self.attention(first, positions), self.mlp(second), biases)


class FusedMLP(MLP):
    """The bias of the first linear layer belongs to the GELU."""

    def expand(self, x: Tensor) -> Tensor:
        return product(self.dense_h_to_4h, x)

    def contract(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(bias_gelu(x, self.dense_h_to_4h.bias, approximate=self.approximate))


class ApexLayerNorm(nn.LayerNorm):
    """NVIDIA apex's LayerNorm."""

    def forward(self, x: Tensor) -> Tensor:
        function = fused_layer_norm()
        assert function is not None, "chosen only where it is there"
        result: Tensor = function(at_work(x), self.weight, self.bias, self.normalized_shape, self.eps)
        return result
