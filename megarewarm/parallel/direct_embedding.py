"""An embedding whose gradient is added to what is there: that of the same matrix as a head, or of the micro-batches before.

autograd would make another gradient of the size of the matrix, zero but for the rows of the batch's tokens, and add the two:
0.5 GB of Qwen 2.5's smallest model, and three passes over it.
"""

from __future__ import annotations

from typing import Any

import torch
from megarewarm_kernels.layer.add_rows import add_rows_
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megarewarm.model.autocast import at_work


class DirectEmbedding(nn.Embedding):
    """An embedding whose gradient goes straight to ``weight.grad``, not through autograd. With a head of the same matrix on one
    rank: the backward pass has the head's gradient first. ``rounds``: under autocast the result and what is added have
    autocast's dtype; a cast outside would move 8 bytes more for each value of it."""

    rounds = False

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, s) ids to (b, s, h)."""
        if not torch.is_grad_enabled() or not self.weight.requires_grad:
            return F.embedding(tokens, self.weight)
        # something that asks for a gradient, so that autograd comes here; the weight in a list, where autograd doesn't see it:
        # else it would hold the head's gradient back until this one is there too
        result: Tensor = _Rows.apply(self.weight.new_empty(0, requires_grad=True), tokens, [self.weight], self.rounds)
        return result


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, asks: Tensor, tokens: Tensor, held: list[nn.Parameter], rounds: bool) -> Tensor:
        ctx.save_for_backward(tokens)
        (ctx.weight,) = held
        ctx.set_materialize_grads(False)
        result = F.embedding(tokens, ctx.weight.detach())
        return at_work(result) if rounds else result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, ...]:
        (tokens,) = ctx.saved_tensors
        if grad is not None:
            if ctx.weight.grad is None:
                ctx.weight.grad = torch.zeros_like(ctx.weight)
            add_rows_(ctx.weight.grad, tokens.flatten(), grad.flatten(0, -2))
        return None, None, None, None
