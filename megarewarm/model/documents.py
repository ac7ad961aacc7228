"""Documents within a sequence: where each begins, and which targets belong to another one than their input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megarewarm.packed_rows import plain

IGNORE = -100
"""The target of a position that has none."""


@dataclass(frozen=True)
class DocumentRules:
    """The effects of the token ``eod``, the last of its document: ``reset`` keeps attention and positions within documents,
    ``mask_loss`` drops the loss at the positions where it is the input (as Megatron-LM's reset_attention_mask with
    reset_position_ids, and eod_mask_loss). ``packed``: rows say themselves where documents begin and where there is no token
    (``packed_rows``); their documents are kept apart, and neither a first token nor padding is a target."""

    eod: int
    reset: bool
    mask_loss: bool
    packed: bool = False

    @property
    def separates(self) -> bool:
        """Whether attention and positions stay within documents."""
        return self.reset or self.packed

    @property
    def drops_targets(self) -> bool:
        """Whether some positions have no loss."""
        return self.mask_loss or self.packed

    def ids(self, inputs: Tensor) -> Tensor:
        """The ids that a model takes for ``inputs`` (b, s)."""
        return plain(inputs) if self.packed else inputs

    def starts(self, inputs: Tensor) -> Tensor | None:
        """(b, s) int64: the first position of the document that each position of ``inputs`` (b, s) lies in; None where a
        sequence is one document."""
        if not self.separates:
            return None
        first = torch.zeros_like(inputs, dtype=torch.bool)
        if self.reset:
            first[:, 1:] |= inputs[:, :-1] == self.eod
        if self.packed:
            first |= inputs < 0
        begins = torch.arange(inputs.shape[1], device=inputs.device).repeat(inputs.shape[0], 1)
        return begins.masked_fill_(~first, 0).cummax(1).values

    def targets(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """``targets`` (b, s), with IGNORE where the input ends a document if ``mask_loss``, and where a document begins or
        nothing is if ``packed``."""
        if self.packed:
            targets = targets.masked_fill(targets < 0, IGNORE)
        return targets.masked_fill(inputs == self.eod, IGNORE) if self.mask_loss else targets
