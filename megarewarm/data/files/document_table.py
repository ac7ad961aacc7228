"""A number for each of a token file's documents, kept in a file of its own: scores of all documents, or a list of some.

Scores order and select documents; a list is what a selection keeps. Both are a safetensors file with one tensor, and know the
token file that they belong to, so that numbers of other documents are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from megarewarm.data.files.file_identity import FileIdentity, identity_of
from megarewarm.data.files.token_file import TokenFile
from megarewarm.errors import UserError
from megarewarm.files import write_whole

SUFFIX = ".safetensors"
FORMAT = "megarewarm.documents.1"

Kind = Literal["scores", "list"]
_DTYPES: dict[Kind, npt.DTypeLike] = {"scores": np.float64, "list": np.int64}
_WORDS: dict[Kind, str] = {"scores": "scores of documents", "list": "a list of documents"}


@dataclass(frozen=True)
class DocumentTable:
    """``values``: of kind 'scores' one float64 per document of the file, (documents,), NaN for a document without a score; of
    kind 'list' the numbers of some documents, (n,) int64, ascending, none twice. ``about``: how they were made, for people and
    manifests (``name`` says what the score is, such as 'loss')."""

    kind: Kind
    values: npt.NDArray[np.float64] | npt.NDArray[np.int64]
    about: Mapping[str, str] = field(default_factory=dict)


class TableUsed(BaseModel):
    """A table that a run read: where it was, and a ``digest`` of its values, by which two of them are the same or not."""

    model_config = ConfigDict(frozen=True)

    path: str
    digest: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TableUsed) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


class _Said(BaseModel):
    """What a table's file says of itself."""

    kind: Kind
    file: FileIdentity
    documents: int
    tokens: int
    about: dict[str, str]


def table_path(path: str | Path) -> Path:
    """The file of the table ``path``, whose name always ends in .safetensors."""
    return Path(path) if str(path).endswith(SUFFIX) else Path(f"{path}{SUFFIX}")


def write_table(path: str | Path, table: DocumentTable, file: TokenFile, *, overwrite: bool = False) -> Path:
    """Write ``table`` of the documents of ``file``, whole or not at all; returns the file's path.

    Raises ``UserError`` if it exists and ``overwrite`` is False, ``ValueError`` for values that don't fit ``file``.
    """
    place = table_path(path)
    values = np.ascontiguousarray(table.values, _DTYPES[table.kind])
    if (wrong := _misfit(table.kind, values, file)) is not None:
        raise ValueError(f"{place}: {wrong}")
    if place.exists() and not overwrite:
        raise UserError(f"{place} exists: remove it, choose another name, or add --overwrite")
    said = {
        "kind": table.kind,
        "file": identity_of(file).model_dump(),
        "documents": file.num_documents,
        "tokens": file.total_tokens,
        "about": dict(table.about),
    }
    # one key: safetensors writes several in any order, and the same table is to be the same bytes
    write_whole(place, save({"values": values}, metadata={FORMAT: json.dumps(said, sort_keys=True)}))
    return place


def read_table(path: str | Path, kind: Kind, file: TokenFile) -> DocumentTable:
    """The table at ``path``, which must be of ``kind`` and of the documents of ``file``; the path of ``file`` may be another
    than when it was written, its contents may not. Raises ``UserError``."""
    place = table_path(path)
    if not place.is_file():
        raise UserError(f"{place.absolute()} does not exist: expected {_WORDS[kind]} of {file.path}")
    try:
        with safe_open(str(place), framework="numpy") as opened:
            said = _Said.model_validate_json((opened.metadata() or {}).get(FORMAT, "{}"))
            values = opened.get_tensor("values")
    except ValidationError as error:
        raise UserError(f"{place} holds no numbers by document ({FORMAT}): expected {_WORDS[kind]} of {file.path}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{place} is no readable safetensors file ({str(error).splitlines()[0]}): make it again") from error
    if said.kind != kind:
        raise UserError(f"{place} is {_WORDS[said.kind]}, expected {_WORDS[kind]}")
    _check_file(place, said, file)
    if values.dtype != _DTYPES[kind] or (wrong := _misfit(kind, values, file)) is not None:
        raise UserError(f"{place}: {wrong if values.dtype == _DTYPES[kind] else f'values are {values.dtype}'}: make it again")
    return DocumentTable(kind, values, said.about)


def used(path: str | Path, table: DocumentTable) -> TableUsed:
    """What a lineage records of the ``table`` at ``path``."""
    digest = hashlib.blake2b(np.ascontiguousarray(table.values).data, digest_size=16)
    return TableUsed(path=str(table_path(path)), digest=digest.hexdigest())


def _misfit(kind: Kind, values: npt.NDArray[np.float64] | npt.NDArray[np.int64], file: TokenFile) -> str | None:
    if values.ndim != 1:
        return f"values have shape {values.shape}, expected one number each"
    if kind == "scores":
        return None if len(values) == file.num_documents else f"{len(values)} scores for {file.num_documents} documents"
    if values.size and (int(values[0]) < 0 or int(values[-1]) >= file.num_documents or bool((np.diff(values) <= 0).any())):
        return f"the list is not ascending within the {file.num_documents} documents of {file.path}"
    return None


def _check_file(place: Path, said: _Said, file: TokenFile) -> None:
    """Raise ``UserError`` where ``said``, of a table's file, is of other documents than those of ``file``."""
    then, now = (said.documents, said.tokens), (file.num_documents, file.total_tokens)
    difference = f"{then[0]} documents of {then[1]} tokens then, {now[0]} of {now[1]} now" if then != now else None
    difference = difference or identity_of(file).differing(said.file)
    if difference is not None:
        raise UserError(
            f"{place} was made of {said.file.path}, whose documents are not those of {file.path} ({difference}): make it again"
        )
