"""Some documents of a token file, in any order, as if they were a file of their own: selected or sorted without a copy."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megarewarm.data.files.document_table import DocumentTable, TableUsed
from megarewarm.data.files.shuffled_documents import ShuffledDocuments
from megarewarm.data.files.token_file import TokenFile, TokenView

_BLOCK = 2**20  # documents in memory at a time beside the arrays that stay


@dataclass(frozen=True)
class ListedDocuments(TokenView):
    """Documents of ``file``, counted from 0 in the order in which they are read; ``first_token`` is 0 too.

    ``taken``: which documents these are, as a range of the file's or of those of the list ``documents``; ``scores``: by which
    they were sorted. Memory: 6.25 bytes a document (10.25 where the file has 2**31 documents or more), some 20 more while it is
    made.
    """

    row: ShuffledDocuments = field(repr=False)
    taken: tuple[int, int]
    documents: TableUsed | None = None
    scores: TableUsed | None = None
    descending: bool = False

    def sizes_between(self, first: int, last: int) -> npt.NDArray[np.int64]:
        return self.row.sizes(np.arange(first, last))

    def in_file(self, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return self.row.order[documents].astype(np.int64)

    def runs(self, starts: npt.NDArray[np.int64], length: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        rows, begins, lengths = self.row.pieces(starts, length)
        return self.file.starts_of(self.in_file(rows)) + begins, lengths

    @property
    def documents_of(self) -> tuple[int, int]:
        return self.taken

    @property
    def span(self) -> tuple[int, int]:
        return 0, self.file.total_tokens


def listed(file: TokenFile, table: DocumentTable, used: TableUsed) -> ListedDocuments:
    """The documents of a list of ``file``, in the file's order."""
    numbers = table.values.astype(_numbers(file))
    sizes = np.empty(len(numbers), np.int32)
    for first in range(0, file.num_documents, _BLOCK):
        last = min(first + _BLOCK, file.num_documents)
        begin, end = np.searchsorted(numbers, [first, last])
        sizes[begin:end] = file.document_sizes(first, last)[numbers[begin:end] - first]
    return ListedDocuments(
        file, 0, len(numbers), 0, int(sizes.sum(dtype=np.int64)), _row(numbers, sizes), (0, len(numbers)), documents=used
    )


def by_score(view: TokenView, table: DocumentTable, used: TableUsed, *, descending: bool) -> tuple[ListedDocuments, int]:
    """(the documents of ``view`` in the order of the scores of all documents of its file, how many have none). Those without a
    score (NaN) come last, equal scores in the view's order."""
    numbers = view.in_file(np.arange(view.first_document, view.last_document))
    scores = table.values[numbers]
    order = np.argsort(-scores if descending else scores, kind="stable")
    row = _row(numbers[order].astype(_numbers(view.file)), view.sizes()[order].astype(np.int32))
    found = ListedDocuments(
        view.file,
        0,
        len(order),
        0,
        view.num_tokens,
        row,
        view.documents_of,
        documents=view.documents if isinstance(view, ListedDocuments) else None,
        scores=used,
        descending=descending,
    )
    return found, int(np.isnan(scores).sum())


def _row(numbers: npt.NDArray[np.signedinteger], sizes: npt.NDArray[np.int32]) -> ShuffledDocuments:
    return ShuffledDocuments(ShuffledDocuments.arrays_of(numbers, sizes, None))


def _numbers(file: TokenFile) -> npt.DTypeLike:
    return np.int32 if file.num_documents < 2**31 else np.int64
