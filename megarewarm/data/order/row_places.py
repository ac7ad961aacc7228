"""Where the tokens of a training row come from: the file, the sample, and the parts of documents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megarewarm.data.files.token_file import TokenFile


@dataclass(frozen=True)
class DocumentPart:
    """``tokens`` tokens of document number ``document`` of the file, from its token ``offset`` on."""

    document: int
    offset: int
    tokens: int


@dataclass(frozen=True)
class RowPlace:
    """Row ``row`` of a batch, at ``position`` of the run's data: sample ``sample`` of the source named ``source``, whose file
    is ``path``."""

    row: int
    position: int
    source: str
    path: str
    sample: int
    parts: list[DocumentPart]


def runs_of(file: TokenFile, starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> list[DocumentPart]:
    """The parts of documents that runs of ``lengths`` tokens from ``starts`` on consist of. Documents without tokens have
    none."""
    found = []
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        end = start + length
        while start < end:
            document = file.document_at(start)
            begin = file.document_start(document)
            count = min(end, begin + int(file.document_sizes(document, document + 1)[0])) - start
            found.append(DocumentPart(document, start - begin, count))
            start += count
    return found
