"""Weights laid out once for many products with few rows, on a CPU in fp32: in the blocks that oneDNN's kernels read.

The sums are the same fp32 sums in another order. ``F.linear`` calls MKL, which lays the weights out at each call: 65 GFLOP/s
where this has 158, on an AMD processor (docs/benchmarks.md).
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from megarewarm.model.transformer import Transformer

Module = TypeVar("Module", bound=nn.Module)


class PackedLinear(nn.Module):
    """x W^T + b of a ``weight`` (out, in), of which it holds a copy."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self._bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return product


def can_pack(weight: Tensor) -> bool:
    """Whether ``PackedLinear`` takes it here."""
    here = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return here and weight.device.type == "cpu" and weight.dtype == torch.float32


def with_packed_layers(model: Transformer) -> Transformer:
    """``model`` with all products of its layers packed; it shares the rest."""
    return with_child(model, "layers", _packed(model.layers))


def with_child(module: Module, name: str, child: nn.Module) -> Module:
    """``module`` itself, sharing all parameters, with ``child`` in place of its own ``name``."""
    changed = copy.copy(module)
    changed._modules = {**module._modules, name: child}
    return changed


def _packed(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.Linear):
        return PackedLinear(module.weight, module.bias)
    for name, child in module._modules.items():
        if child is not None:
            module = with_child(module, name, _packed(child))
    return module
