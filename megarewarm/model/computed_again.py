"""A tensor that is computed again in the backward pass instead of being kept for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def computed_again(value: Tensor, function: Callable[[Tensor], Tensor], source: Tensor) -> AbstractContextManager[object]:
    """Operations in this context keep ``source`` where they would keep ``value``, and compute ``function(source)``, the same
    numbers, when they need it. Worth it where ``source`` is kept anyway. Not within a checkpointed region, whose hooks it
    would hide. A compiler decides by itself what to compute again."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return nullcontext()
    source, place, shape = source.detach(), value.data_ptr(), value.shape

    def pack(tensor: Tensor) -> Tensor | torch.Size:
        # an operation may keep a view of it that has fewer dimensions
        same = tensor.data_ptr() == place and tensor.numel() == shape.numel() and tensor.is_contiguous()
        return tensor.shape if same else tensor

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else function(source).view(kept)

    return saved_tensors_hooks(pack, unpack)
