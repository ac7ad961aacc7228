"""Rows of the embedding and of the head that were never trained: near zero, or bit for bit those of another id."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from megarewarm.checkpoint.source import OpenedCheckpoint
from megarewarm.checkpoint.tokenizer_source import loaded
from megarewarm.checkpoint.weights import OnBytes
from megarewarm.data.text.tokenizers import Tokenizer
from megarewarm.errors import UserError
from megarewarm.model.parameters import cards

NEAR_ZERO = 0.01
"""Of the median norm of all rows of the matrix."""
_BLOCK = 4096
_MOST_TOKENS = 8


@dataclass(frozen=True)
class UntrainedRows:
    """Ids of ``matrix`` (its role, 'embedding' or 'head') whose rows are alike. ``why``: 'near zero' or 'equal'."""

    matrix: str
    why: str
    ids: list[int]


def untrained_rows(source: OpenedCheckpoint, on_bytes: OnBytes = lambda _: None) -> list[UntrainedRows]:
    """Of each matrix with rows of the vocabulary: those near zero, then each set of rows that are equal and not near zero."""
    found = []
    for name, card in cards(source.model_config).items():
        if card.has_vocabulary:
            rows = source.stored.read(name)
            on_bytes(rows.nbytes)
            found += _of(card.role, rows)
    return found


def _of(matrix: str, rows: Tensor) -> list[UntrainedRows]:
    norms = torch.cat([torch.linalg.vector_norm(block, dim=1, dtype=torch.float64) for block in rows.split(_BLOCK)])
    zero = norms <= NEAR_ZERO * norms.nanmedian()
    alike: dict[bytes, list[int]] = defaultdict(list)
    for first in range(0, len(rows), _BLOCK):
        block = rows[first : first + _BLOCK].contiguous().view(torch.uint8).numpy()
        for i in range(len(block)):
            if not zero[first + i]:
                alike[blake2b(block[i], digest_size=16).digest()].append(first + i)
    sets = [UntrainedRows(matrix, "near zero", ids)] if (ids := torch.nonzero(zero)[:, 0].tolist()) else []
    return sets + [UntrainedRows(matrix, "equal", ids) for ids in alike.values() if len(ids) > 1]


def table(source: OpenedCheckpoint, found: Sequence[UntrainedRows]) -> Table:
    """A row for each set, with its ids and the first of their tokens."""
    shown = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", caption_justify="left")
    ways = f"norm at most {NEAR_ZERO:g} of the median, or equal bit for bit"
    if not found:
        shown.add_row(f"no row of the vocabulary looks untrained ({ways})")
        return shown
    for heading in ("matrix", "rows are", "count", "ids", "tokens"):
        shown.add_column(heading, justify="right" if heading == "count" else "left", overflow="fold")
    tokenizer = _tokenizer(source)
    for each in found:
        tokens = _tokens(each.ids, tokenizer) if tokenizer is not None else ""
        shown.add_row(each.matrix, each.why, f"{len(each.ids):,}", _ranges(each.ids), escape(tokens))
    shown.caption = f"rows never trained: {ways}"
    if tokenizer is None:
        shown.caption += "; the checkpoint comes with no readable tokenizer"
    return shown


def _tokenizer(source: OpenedCheckpoint) -> Tokenizer | None:
    try:
        return None if source.tokenizer.file is None else loaded(source.tokenizer.file)
    except UserError:
        return None


def _ranges(ids: Sequence[int]) -> str:
    """'3, 7-9' of 3, 7, 8, 9."""
    runs = [[i for _, i in run] for _, run in groupby(enumerate(ids), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _tokens(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The first tokens in quotes, and how many ids have none."""
    named = [i for i in ids if tokenizer.token(i) is not None]
    shown = [str(tokenizer.shown(i)) for i in named[:_MOST_TOKENS]]
    more = [f"{len(named) - len(shown):,} more"] if len(named) > len(shown) else []
    without = [f"{len(ids) - len(named):,} past the tokenizer"] if len(named) < len(ids) else []
    return ", ".join([*shown, *more, *without])
