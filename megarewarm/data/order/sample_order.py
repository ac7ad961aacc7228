"""A lineage's record of an order of samples: enough to find any of them again in the same file."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class SampleOrder(BaseModel):
    """Everything but the file itself that decides which tokens sample i of a source is.

    ``key``: of the permutations ('permuted') or the seed of the shuffles ('neox', 'megatron'). ``epochs``: the ranges of epochs
    that are shuffled each for itself. ``dtype``: of the ids.
    """

    model_config = ConfigDict(frozen=True)

    kind: Literal["permuted", "neox", "megatron", "rows"]
    sequence_length: int
    dtype: str
    first_document: int
    last_document: int
    key: int = 0
    epochs: tuple[tuple[int, int], ...] = ()
    first_row: int = 0


class SamplesRead(BaseModel):
    """The samples [first, last) of each of ``ranges``, in the order they were read.

    ``again``: they were read as a replay of an earlier stage's samples, so the ranges are those of that stage's order; of
    several orders, the one that was read last. Samples within such a range that another order had before were passed over.
    """

    model_config = ConfigDict(frozen=True)

    order: SampleOrder
    ranges: tuple[tuple[int, int], ...]
    again: bool = False
