"""The gradient of a bias, given by what reads the sum it is part of.

Where y = x W' + b, the gradient of b is the sum of y's over all tokens. What follows y makes a pass over that gradient and can
sum it on the way; then y is computed with b detached, and b is an argument of what follows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarewarm_kernels.operators import exact


def give_bias_gradients(y: Tensor, *biases: Tensor | None) -> Tensor:
    """``y`` (..., c), which holds ``biases`` (c,) without their derivatives: each gets the sum of y's gradient, taken in fp32
    (fp64 for fp64). None: there is none, or it has a derivative."""
    present = [bias for bias in biases if bias is not None]
    result: Tensor = _GiveBiasGradients.apply(y, *present) if present else y
    return result


def column_sums(grad: Tensor, bias: Tensor) -> Tensor:
    """The gradient of ``bias`` (c,): the sum of ``grad`` (..., c) over all but its columns, in fp32 (fp64 for fp64)."""
    return grad.flatten(0, -2).sum(0, dtype=exact(grad.dtype)).to(bias.dtype)


class _GiveBiasGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *biases: Tensor) -> Tensor:
        ctx.save_for_backward(*biases)
        return y.detach()  # no view to autograd, which torch's pipelines would refuse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        each = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return grad, *(column_sums(grad, bias) if wanted else None for bias, wanted in each)
