"""Parts of GPT-NeoX's layers that compute the same in fewer passes."""

from __future__ import annotations

from typing import Any

from megarewarm_kernels import bias_gelu, gelu_products, residual_norm, residual_norms
from megarewarm_kernels.apex import fused_layer_norm
from megarewarm_kernels.layer.gelu_products import LowLayer
from torch import Tensor, nn

from megarewarm.model.autocast import at_work
from megarewarm.model.given_bias import GivenBias, waiting_bias
from megarewarm.model.low_weights import copies_of, product
from megarewarm.model.neox import MLP, DeferredResidual, Layer
from megarewarm.model.positions import Positions


def _apart(x: Tensor | DeferredResidual) -> tuple[tuple[Any, Any, Any], tuple[Tensor | None, Tensor | None]]:
    """The residual stream with the parts to be added, in autocast's dtype, and biases that wait for their gradients."""
    return (x[:3], x.biases) if isinstance(x, DeferredResidual) else ((at_work(x), None, None), (None, None))


class FusedLayer(Layer):
    """A layer with the parallel residual that adds the parts of the one before, and passes on its own parts. Under autocast
    the stream has autocast's dtype."""

    def forward(self, x: Tensor | DeferredResidual, positions: Positions) -> DeferredResidual:  # type: ignore[override]
        parts, waiting = _apart(x)
        one, other = self.input_layernorm, self.post_attention_layernorm
        total, first, second = residual_norms(
            *parts, one.weight, one.bias, other.weight, other.bias, eps=one.eps, biases=waiting
        )
        biases = waiting_bias(self.attention.dense), waiting_bias(self.mlp.dense_4h_to_h)
        return DeferredResidual(total, self.attention(first, positions), self.mlp(second), biases)


class FusedLastNorm(nn.LayerNorm):
    """The norm after the last layer, which adds its parts."""

    adds_parts = True

    def forward(self, x: Tensor | DeferredResidual) -> Tensor:
        parts, waiting = _apart(x)
        return residual_norm(*parts, self.weight, self.bias, eps=self.eps, biases=waiting)


class FusedMLP(MLP):
    """The bias of the first linear layer belongs to the GELU."""

    def expand(self, x: Tensor) -> Tensor:
        return product(self.dense_h_to_4h, x)

    def contract(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(bias_gelu(x, self.dense_h_to_4h.bias, approximate=self.approximate))


class GeluProductsMLP(FusedMLP):
    """Bias and GELU are part of the products, where these read copies of the weights; else as in ``FusedMLP``.
    ``keeps_result``: of the GELU, for the backward pass."""

    keeps_result = True

    def forward(self, x: Tensor) -> Tensor:
        layers = [_low_layer(linear, x.device.type) for linear in (self.dense_h_to_4h, self.dense_4h_to_h)]
        if layers[0] is None or layers[1] is None:
            return super().forward(x)
        return gelu_products(at_work(x), layers[0], layers[1], keep=self.keeps_result)


def _low_layer(linear: nn.Linear, device: str) -> LowLayer | None:
    low = copies_of(linear, device)
    bias = linear.bias.detach() if isinstance(linear, GivenBias) else linear.bias
    return None if low is None else LowLayer(linear.weight, bias, low["weight"].fresh(), low["bias"].fresh())


class ApexLayerNorm(nn.LayerNorm):
    """NVIDIA apex's LayerNorm."""

    def forward(self, x: Tensor) -> Tensor:
        function = fused_layer_norm()
        assert function is not None, "chosen only where it is there"
        result: Tensor = function(at_work(x), self.weight, self.bias, self.normalized_shape, self.eps)
        return result
