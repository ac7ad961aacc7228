"""Documents within a sequence: where each begins, and which targets belong to another one than their input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
"""The target of a position that has none."""


@dataclass(frozen=True)
class DocumentRules:
    """The effects of the token ``eod``, the last of its document: ``reset`` keeps attention and positions within documents,
    ``mask_loss`` drops the loss at the positions where it is the input (as Megatron-LM's reset_attention_mask with
    reset_position_ids, and eod_mask_loss)."""

    eod: int
    reset: bool
    mask_loss: bool

    def starts(self, inputs: Tensor) -> Tensor | None:
        """(b, s) int64: the first position of the document that each position of ``inputs`` (b, s) lies in; None without
        ``reset``, where a sequence is one document."""
        if not self.reset:
            return None
        begins = torch.arange(inputs.shape[1], device=inputs.device).repeat(inputs.shape[0], 1)
        begins[:, 1:].masked_fill_(inputs[:, :-1] != self.eod, 0)
        begins[:, :1] = 0
        return begins.cummax(1).values

    def targets(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """``targets`` (b, s), with IGNORE where the input ends a document if ``mask_loss``."""
        return targets.masked_fill(inputs == self.eod, IGNORE) if self.mask_loss else targets
