"""Distillation from the frozen start checkpoint, which keeps the model's predictions or hidden states near it. The teacher
is a whole model on every data-parallel rank, without gradients, in the dtype of the forward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megarewarm_kernels import linear_cross_entropy, linear_distillation
from torch import Tensor

from megarewarm.config.forgetting import DistillConfig
from megarewarm.config.model import ModelConfig
from megarewarm.model.transformer import Transformer


class Teacher:
    """The start checkpoint's model, and the loss against it."""

    def __init__(
        self,
        settings: DistillConfig,
        config: ModelConfig,
        read: Callable[[str], Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """``read`` returns a whole parameter by its name; ``dtype`` is the teacher's dtype."""
        self._settings = settings
        with torch.device("meta"):
            model = Transformer(config)
        self._model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
        for name, parameter in self._model.named_parameters():
            parameter.copy_(read(name))
        self._rows = config.vocab_size

    @torch.no_grad()
    def hidden(self, inputs: Tensor, starts: Tensor | None) -> Tensor:
        """(b, s) ids to the teacher's (b, s, h) states after the last norm."""
        return self._model(inputs, starts)

    def loss(
        self, hidden: Tensor, head: Tensor, targets: Tensor, taught: Tensor, memory_budget: int, kernel: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What is differentiated, the cross entropy in it, and the teacher's term before its weight: sums over (b, s) targets.

        ``hidden``: (b, s, h) of the model, ``taught``: of the teacher. logits: KL(teacher || model) per token; hidden: the mean
        squared difference of the states per token (arXiv 2210.02871).
        """
        targets = targets.flatten()
        if self._settings.kind == "logits":
            total, parts, _ = linear_distillation(
                hidden.flatten(0, 1),
                head,
                targets,
                taught.flatten(0, 1),
                self._model.head,
                share=self._settings.weight,
                valid_rows=self._rows,
                memory_budget=memory_budget,
            )
            return total, parts[0], parts[1]
        cross, _ = linear_cross_entropy(
            hidden.flatten(0, 1), head, targets, valid_rows=self._rows, memory_budget=memory_budget, kernel=kernel
        )
        kept = (targets >= 0)[:, None]
        apart = (hidden.flatten(0, 1).float() - taught.flatten(0, 1).float()).square().masked_fill(~kept, 0).mean(1).sum()
        return cross + self._settings.weight * apart, cross.detach(), apart.detach()
