"""A lineage's record of an order of samples: enough to find any of them again in the same file."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from megarewarm.data.files.document_table import TableUsed

Kind = Literal["permuted", "neox", "megatron", "rows", "sequential"]
_LATER = ("documents", "scores", "descending", "packed")


class SampleOrder(BaseModel):
    """Everything but the file itself that decides which tokens sample i of a source is.

    ``key``: of the permutations ('permuted') or the seed of the shuffles ('neox', 'megatron'). ``epochs``: the ranges of epochs
    that are shuffled each for itself. ``dtype``: of the ids. ``documents``: the list that was read, in which ``first_document``
    and ``last_document`` count then; ``scores``: by which the documents were sorted before; ``packed``: rows of whole
    documents, by best fit, rather than windows.
    """

    model_config = ConfigDict(frozen=True)

    kind: Kind
    sequence_length: int
    dtype: str
    first_document: int
    last_document: int
    key: int = 0
    epochs: tuple[tuple[int, int], ...] = ()
    first_row: int = 0
    documents: TableUsed | None = None
    scores: TableUsed | None = None
    descending: bool = False
    packed: bool = False

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is not used: the text is part of fingerprints, and is to stay as earlier versions wrote it."""
        return {key: value for key, value in handler(self).items() if key not in _LATER or value}


class SamplesRead(BaseModel):
    """The samples [first, last) of each of ``ranges``, in the order they were read.

    ``again``: they were read as a replay of an earlier stage's samples, so the ranges are those of that stage's order; of
    several orders, the one that was read last. Samples within such a range that another order had before were passed over.
    """

    model_config = ConfigDict(frozen=True)

    order: SampleOrder
    ranges: tuple[tuple[int, int], ...]
    again: bool = False
