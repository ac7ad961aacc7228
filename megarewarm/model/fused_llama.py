"""Parts of Llama-like layers that compute the same in fewer passes."""

from __future__ import annotations

from contextlib import nullcontext

from megarewarm_kernels import norm_heads, norm_widths, residual_rms_norm, rms_norm, swiglu
from torch import Tensor

from megarewarm.model.autocast import at_work
from megarewarm.model.computed_again import computed_again
from megarewarm.model.llama import (
    DeferredSum,
    GatedMLP,
    HeadNormedAttention,
    NormBefore,
    RMSNorm,
    WidthNormedAttention,
)
from megarewarm.model.positions import Positions


class FusedNormBefore(NormBefore):
    """A layer that adds the MLP of the one before where it norms the sum, and passes on its own. Under autocast the stream has
    autocast's dtype."""

    def forward(self, x: Tensor | DeferredSum, positions: Positions) -> DeferredSum:  # type: ignore[override]
        stream, out = x if isinstance(x, DeferredSum) else (at_work(x), None)
        one, other = self.attention_norm, self.mlp_norm
        stream, normed = residual_rms_norm(stream, out, one.weight, eps=one.eps)
        stream, normed = residual_rms_norm(stream, self.attention(normed, positions), other.weight, eps=other.eps)
        return DeferredSum(stream, self.mlp(normed))


class FusedRMSNorm(RMSNorm):
    """A norm that keeps its input and one number per row for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)


class FusedHeadNormedAttention(HeadNormedAttention):
    """Queries and keys normed in one pass."""

    def normed(self, qkv: Tensor) -> Tensor:
        query, key = self.query_norm, self.key_norm
        return norm_heads(qkv, query.weight, key.weight, head_dim=self.head_dim, group=self.group, eps=query.eps)


class FusedWidthNormedAttention(WidthNormedAttention):
    """Queries and keys normed in one pass."""

    def normed(self, qkv: Tensor) -> Tensor:
        query, key = self.query_norm, self.key_norm
        return norm_widths(qkv, query.weight, key.weight, head_dim=self.head_dim, group=self.group, eps=query.eps)


class FusedGatedMLP(GatedMLP):
    """Gate and up alone are kept for the backward pass: their product is computed again, unless ``checkpointed``, where all of
    the layer is."""

    checkpointed = False

    def contract(self, x: Tensor) -> Tensor:
        product = swiglu(x)
        with nullcontext() if self.checkpointed else computed_again(product, swiglu, x):
            return self.down(product)
