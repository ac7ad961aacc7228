"""Fused operations, applied to a model from outside: they replace parts by ones that compute the same in fewer passes.

A norm of a sum is one operation with the sum, if a layer passes its parts on instead of adding them: with the parallel
residual of GPT-NeoX x, attention and MLP (``DeferredResidual``), in Llama's layers x and the MLP (``DeferredSum``).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from megarewarm.model import fused_llama, fused_neox, llama, neox
from megarewarm.model.given_bias import GivenBias
from megarewarm.model.transformer import Transformer


@dataclass(frozen=True)
class Operations:
    """The implementation of each operation. ``loss``: the ``kernel`` of linear_cross_entropy; ``norms``: triton, apex or
    reference; ``gelu``: triton (of SwiGLU too), cublaslt or reference; ``attention``: a backend of
    megarewarm_kernels.attention.choose. triton: the operators of megarewarm_kernels, which are computed by their definitions
    where there is no GPU."""

    norms: str = "reference"
    gelu: str = "reference"
    attention: str = "auto"
    loss: str = "auto"
    deterministic: bool = False


def fuse(model: Transformer, operations: Operations, *, sharded: bool = False) -> None:
    """Replace parts of ``model``, which may be divided over tensor ranks. Parameters and their names stay. ``sharded``: layers
    hold their parameters only while they compute, so none can use those of another."""
    for layer in model.layers:
        if operations.norms == "triton" and type(layer) is neox.Layer and layer.parallel:
            layer.__class__ = fused_neox.FusedLayer
            if not sharded:
                _give_bias(layer.attention.dense)
                _give_bias(layer.mlp.dense_4h_to_h)
        for module in layer.modules():
            if isinstance(module, neox.Attention | llama.GroupedAttention):
                module.backend, module.deterministic = operations.attention, operations.deterministic
                if operations.attention not in ("auto", "sdpa", "reference") and not _norms_heads(module):
                    _give_bias(module.query_key_value)
            if operations.norms == "triton" and not _has_divided_norms(module):
                module.__class__ = _NORMS.get(type(module), type(module))
            elif operations.norms == "apex" and type(module) is nn.LayerNorm:
                module.__class__ = fused_neox.ApexLayerNorm
            if operations.gelu == "cublaslt" and type(module) is neox.MLP and _has_plain_products(module):
                module.__class__ = fused_neox.GeluProductsMLP
            if operations.gelu == "triton" and not _has_divided_expansion(module):
                module.__class__ = _ACTIVATIONS.get(type(module), type(module))
    if any(type(layer) is fused_neox.FusedLayer for layer in model.layers):
        model.final_layer_norm.__class__ = fused_neox.FusedLastNorm
    if operations.norms == "triton" and type(model.final_layer_norm) is llama.RMSNorm:
        model.final_layer_norm.__class__ = fused_llama.FusedRMSNorm


def rounds_stream(layer: nn.Module) -> bool:
    """Whether ``layer`` passes on a residual stream in autocast's dtype under autocast, not in fp32."""
    return isinstance(layer, fused_neox.FusedLayer | fused_llama.FusedNormBefore)


_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    llama.NormBefore: fused_llama.FusedNormBefore,
    llama.RMSNorm: fused_llama.FusedRMSNorm,
    llama.HeadNormedAttention: fused_llama.FusedHeadNormedAttention,
    llama.WidthNormedAttention: fused_llama.FusedWidthNormedAttention,
}
_ACTIVATIONS: dict[type[nn.Module], type[nn.Module]] = {
    neox.MLP: fused_neox.FusedMLP,
    llama.GatedMLP: fused_llama.FusedGatedMLP,
}


def _norms_heads(module: nn.Module) -> bool:
    """Whether norms lie between the projection and the attention, so that its gradient is not the projection's."""
    return isinstance(module, llama.HeadNormedAttention | llama.WidthNormedAttention)


def _give_bias(linear: nn.Linear) -> None:
    """Let what reads its result give its bias a gradient; not where ``linear`` does more than a product."""
    if type(linear) is nn.Linear and linear.bias is not None:
        linear.__class__ = GivenBias


def _has_divided_norms(module: nn.Module) -> bool:
    """Whether tensor ranks add up its squares, which its operator doesn't."""
    return isinstance(module, llama.WidthNormedAttention) and type(module.query_norm) is not llama.RMSNorm


def _has_plain_products(module: neox.MLP) -> bool:
    """Whether its linear layers are products with biases and nothing else, as those of tensor ranks are not."""
    return type(module.dense_h_to_4h) is nn.Linear and type(module.dense_4h_to_h) in (nn.Linear, GivenBias)


def _has_divided_expansion(module: nn.Module) -> bool:
    """Whether its first linear layer does more than its operator replaces."""
    return isinstance(module, neox.MLP) and type(module.dense_h_to_4h) is not nn.Linear
