"""How tensor-parallel parts of a parameter make the whole, in the files of GPT-NeoX and Megatron-LM.

Heads, MLP columns and vocabulary rows are divided; norms are held whole by every rank. The bias of a projection that sums
over ranks is the odd one: with GPT-NeoX's parallel residual every rank adds its own bias before the sum, so the bias
of the model is the sum of the ranks' (GPT-NeoX issues 615, 962); elsewhere it is added once and the ranks hold copies.
Matrices that lie in one another row by row here lie there one after another, in each rank's part (``Arrangement``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megarewarm.errors import UserError
from megarewarm.model.interleaved import Interleaved
from megarewarm.model.parameters import kind_of

Sharing = Literal["rows", "columns", "copies", "added"]


@dataclass(frozen=True)
class Arrangement:
    """Several matrices (or biases) in one, other than here (``ours``). ``order``: which matrix here is the first, second, ...
    there. ``unit``: rows of one count in a turn there; None where each matrix is in one piece. It is of a rank's part."""

    ours: Interleaved
    order: tuple[int, ...]
    unit: int | None = None

    def _theirs(self, rows: int) -> Interleaved:
        counts = tuple(self.ours.counts[i] for i in self.order)
        return Interleaved(counts, rows // sum(counts) if self.unit is None else self.unit)

    def to_ours(self, part: Tensor) -> Tensor:
        """A part as stored there, in our order of rows."""
        there = self._theirs(part.shape[0]).split(part.contiguous())
        return self.ours.join([there[self.order.index(i)] for i in range(len(there))])

    def to_theirs(self, part: Tensor) -> Tensor:
        """The inverse of ``to_ours``."""
        here = self.ours.split(part.contiguous())
        return self._theirs(part.shape[0]).join([here[i] for i in self.order])


def sharing_of(name: str, *, biases_added: bool) -> Sharing:
    """How the parts of parameter ``name`` make the whole. ``biases_added``: see above."""
    try:
        kind = kind_of(name)
    except KeyError:
        return "copies"  # a name that no model has is refused with the others (``weights.check``)
    if kind.divided is not None:
        return "columns" if kind.divided else "rows"
    return "added" if biases_added and kind.is_added_after_sum else "copies"


def merge(parts: Sequence[Tensor], sharing: Sharing) -> Tensor:
    """The whole of a parameter's parts in the order of their ranks. Copies that have drifted apart are averaged in fp32."""
    if len(parts) == 1:
        return parts[0]
    if sharing in ("rows", "columns"):
        return torch.cat(list(parts), dim=0 if sharing == "rows" else 1)
    if sharing == "added":
        return torch.stack([part.float() for part in parts]).sum(0).to(parts[0].dtype)
    if all(torch.equal(part, parts[0]) for part in parts[1:]):
        return parts[0]
    return torch.stack([part.float() for part in parts]).mean(0).to(parts[0].dtype)


def whole_shape(part: Sequence[int], ranks: int, sharing: Sharing) -> tuple[int, ...]:
    """Shape of the whole whose parts have the shape ``part``."""
    shape = list(part)
    if sharing in ("rows", "columns"):
        shape[0 if sharing == "rows" else 1] *= ranks
    return tuple(shape)


def part_shape(whole: Sequence[int], ranks: int, sharing: Sharing) -> tuple[int, ...]:
    """Shape of each of ``ranks`` parts of a whole."""
    shape = list(whole)
    if sharing in ("rows", "columns"):
        shape[0 if sharing == "rows" else 1] //= ranks
    return tuple(shape)


def require_divisible(name: str, shape: Sequence[int], ranks: int, sharing: Sharing) -> None:
    """Raise ``UserError`` if ``ranks`` tensor ranks can't share parameter ``name`` evenly."""
    if sharing not in ("rows", "columns"):
        return
    size = shape[0 if sharing == "rows" else 1]
    if size % ranks:
        vocabulary = "; pad or cut the vocabulary with --vocab-size" if kind_of(name).has_vocabulary else ""
        raise UserError(f"{name}: {size} {sharing} are not divisible by {ranks} tensor ranks{vocabulary}")


def split(whole: Tensor, ranks: int, sharing: Sharing, name: str) -> list[Tensor]:
    """The parts of a parameter for ``ranks`` tensor ranks; ``merge`` gives back the same bits. Raises ``UserError`` where
    the ranks don't divide it."""
    if ranks == 1:
        return [whole]
    if sharing in ("rows", "columns"):
        require_divisible(name, whole.shape, ranks, sharing)
        return [part.contiguous() for part in whole.chunk(ranks, 0 if sharing == "rows" else 1)]
    if sharing == "added":
        shares = [whole / ranks] * ranks
        if not torch.equal(merge(shares, sharing), whole):  # 3 ranks, or fp16 values next to zero
            shares = [whole, *[torch.zeros_like(whole)] * (ranks - 1)]
        return shares
    return [whole] * ranks
