"""Several token files as one: the documents of each, in the order given."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megarewarm.data.files.manifest import made_by, manifest_of, refuse_other_tokenizers
from megarewarm.data.files.token_file import TokenFile, TokenFileWriter, open_tokens
from megarewarm.errors import UserError
from megarewarm.files import sha256, write_whole

_BLOCK = 2**22  # tokens in memory at a time, or one document, if that is longer
_DOCUMENTS = 2**20


def merge_token_files(
    prefixes: Sequence[str | Path],
    output: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[int, int]:
    """Write OUTPUT.bin and OUTPUT.idx with all documents of ``prefixes``, and a manifest. Returns (documents, tokens).

    The type of the ids is the widest of the inputs'. ``progress`` is called with the tokens of each block. Raises ``UserError``
    for a file that can't be read, files that were made with different tokenizers as far as their manifests say, an output that
    is one of the inputs or exists without ``overwrite``, and ids that int32 can't hold; nothing is left under the output's
    name then.
    """
    files = [open_tokens(prefix) for prefix in prefixes]
    if not files:
        raise UserError("no token files to merge: name at least one prefix")
    for file in files:
        if file.path.resolve() == Path(f"{output}.bin").resolve():
            raise UserError(f"{output}: is one of the files to be merged; choose another name")
    if not Path(output).name:
        raise UserError(f"--output '{output}': expected a prefix, as data/all, for files of that name")
    made = [found for file in files if (found := made_by(file.path)) is not None]
    refuse_other_tokenizers(made)
    narrow = all(file.dtype.itemsize <= 2 and file.dtype.kind == "u" for file in files)
    with TokenFileWriter(output, np.uint16 if narrow else np.int32, overwrite=overwrite) as writer:
        # an older output's manifest no longer applies
        manifest = Path(f"{output}.json")
        for file in files:
            for first, last in _blocks(file):
                sizes = file.document_sizes(first, last)
                start, count = file.document_start(first), int(sizes.sum())
                ids = file.read(start, count)
                _check_ids(file, first, start, ids)
                writer.add_documents(ids, sizes)
                progress(count)
        manifest.unlink(missing_ok=True)
        counts = writer.num_documents, writer.num_tokens
    said = {
        "documents": counts[0],
        "tokens": counts[1],
        "dtype": writer.dtype.name,
        "merged": [str(file.path) for file in files],
    }
    if len(made) == len(files):
        # of tokenizers that agree, the one with the most added tokens knows all the ids
        fullest = max(range(len(made)), key=lambda i: len(made[i].tokenizer.added or ()))
        told = manifest_of(files[fullest].path) or {}
        said["tokenizer"] = told["tokenizer"]
        if len({each.end for each in made}) == 1 and told.get("eod") is not None:
            said["eod"] = told["eod"]
    said["sha256"] = {suffix: sha256(Path(f"{output}.{suffix}")) for suffix in ("bin", "idx")}
    write_whole(manifest, (json.dumps(said, indent=2) + "\n").encode())
    return counts


def _check_ids(file: TokenFile, document: int, start: int, ids: np.ndarray) -> None:
    if ids.dtype.kind == "u" and ids.dtype.itemsize <= 2:
        return
    if (bad := np.flatnonzero((ids.astype(np.int64) < 0) | (ids > 2**31 - 1))).size:
        place = start + int(bad[0])
        while document + 1 < file.num_documents and file.document_start(document + 1) <= place:
            document += 1
        raise UserError(
            f"{file.path}: token {place}, in document {document}, is {ids[bad[0]]}: ids are 0 to 2147483647; it is damaged or "
            f"holds something else"
        )


def _blocks(file: TokenFile) -> Iterator[tuple[int, int]]:
    """Ranges of documents of about ``_BLOCK`` tokens, at least one document each."""
    for outer in range(0, file.num_documents, _DOCUMENTS):
        ends = np.cumsum(file.document_sizes(outer, min(outer + _DOCUMENTS, file.num_documents)))
        first, before = 0, 0
        while first < len(ends):
            last = max(first + 1, int(np.searchsorted(ends, before + _BLOCK, side="right")))
            yield outer + first, outer + last
            first, before = last, int(ends[last - 1])
