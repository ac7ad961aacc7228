"""How tensor-parallel parts of a parameter make the whole, in the files of GPT-NeoX and Megatron-LM.

Heads, MLP columns and vocabulary rows are divided; norms are held whole by every rank. The bias of a projection that sums
over ranks is the odd one: with GPT-NeoX's parallel residual every rank adds its own bias before the sum, so the bias
of the model is the sum of the ranks' (GPT-NeoX issues 615, 962); elsewhere it is added once and the ranks hold copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from megarewarm.errors import UserError

Kind = Literal["rows", "columns", "copies", "added"]

_ROWS = ("query_key_value.weight", "query_key_value.bias", "dense_h_to_4h.weight", "dense_h_to_4h.bias")
_COLUMNS = ("attention.dense.weight", "dense_4h_to_h.weight")
_SUMMED_BIASES = ("attention.dense.bias", "dense_4h_to_h.bias")


def kind_of(name: str, *, biases_added: bool) -> Kind:
    """How the parts of ``name`` (in our naming) make the whole. ``biases_added``: see above."""
    if name in ("embed_in.weight", "embed_out.weight") or name.endswith(_ROWS):
        return "rows"
    if name.endswith(_COLUMNS):
        return "columns"
    return "added" if biases_added and name.endswith(_SUMMED_BIASES) else "copies"


def merge(parts: Sequence[Tensor], kind: Kind) -> Tensor:
    """The whole of a parameter's parts in the order of their ranks. Copies that have drifted apart are averaged in fp32."""
    if len(parts) == 1:
        return parts[0]
    if kind in ("rows", "columns"):
        return torch.cat(list(parts), dim=0 if kind == "rows" else 1)
    if kind == "added":
        return torch.stack([part.float() for part in parts]).sum(0).to(parts[0].dtype)
    if all(torch.equal(part, parts[0]) for part in parts[1:]):
        return parts[0]
    return torch.stack([part.float() for part in parts]).mean(0).to(parts[0].dtype)


def whole_shape(part: Sequence[int], ranks: int, kind: Kind) -> tuple[int, ...]:
    """Shape of the whole whose parts have the shape ``part``."""
    shape = list(part)
    if kind in ("rows", "columns"):
        shape[0 if kind == "rows" else 1] *= ranks
    return tuple(shape)


def part_shape(whole: Sequence[int], ranks: int, kind: Kind) -> tuple[int, ...]:
    """Shape of each of ``ranks`` parts of a whole."""
    shape = list(whole)
    if kind in ("rows", "columns"):
        shape[0 if kind == "rows" else 1] //= ranks
    return tuple(shape)


def require_divisible(name: str, shape: Sequence[int], ranks: int, kind: Kind) -> None:
    """Raise ``UserError`` where ``ranks`` tensor ranks can't share parameter ``name`` evenly."""
    if kind not in ("rows", "columns"):
        return
    size = shape[0 if kind == "rows" else 1]
    if size % ranks:
        vocabulary = "; pad or cut the vocabulary with --vocab-size" if name.startswith("embed") else ""
        raise UserError(f"{name}: {size} {kind} are not divisible by {ranks} tensor ranks{vocabulary}")


def split(whole: Tensor, ranks: int, kind: Kind, name: str) -> list[Tensor]:
    """The parts of a parameter for ``ranks`` tensor ranks; ``merge`` gives back the same bits.

    Raises ``UserError`` where the ranks don't divide it.
    """
    if ranks == 1:
        return [whole]
    if kind in ("rows", "columns"):
        require_divisible(name, whole.shape, ranks, kind)
        return [part.contiguous() for part in whole.chunk(ranks, 0 if kind == "rows" else 1)]
    if kind == "added":
        shares = [whole / ranks] * ranks
        if not torch.equal(merge(shares, kind), whole):  # 3 ranks, or fp16 values next to zero
            shares = [whole, *[torch.zeros_like(whole)] * (ranks - 1)]
        return shares
    return [whole] * ranks
