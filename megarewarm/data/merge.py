"""Several token files as one: the documents of each, in the order given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megarewarm.data.token_file import TokenFile, TokenFileWriter, open_tokens
from megarewarm.errors import UserError

_BLOCK = 2**22  # tokens in memory at a time, or one document, if that is longer
_DOCUMENTS = 2**20


def merge_token_files(
    prefixes: Sequence[str | Path],
    output: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[int, int]:
    """Write OUTPUT.bin and OUTPUT.idx with all documents of ``prefixes``. Returns (documents, tokens).

    The type of the ids is the widest of the inputs'. ``progress`` is called with the tokens of each block. Raises ``UserError``
    for a file that can't be read, an output that is one of the inputs or exists without ``overwrite``, and ids that int32
    can't hold; nothing is left under the output's name then.
    """
    files = [open_tokens(prefix) for prefix in prefixes]
    if not files:
        raise UserError("no token files to merge: name at least one prefix")
    for file in files:
        if file.path.resolve() == Path(f"{output}.bin").resolve():
            raise UserError(f"{output}: is one of the files to be merged; choose another name")
    narrow = all(file.dtype.itemsize <= 2 and file.dtype.kind == "u" for file in files)
    with TokenFileWriter(output, np.uint16 if narrow else np.int32, overwrite=overwrite) as writer:
        for file in files:
            for first, last in _blocks(file):
                sizes = file.document_sizes(first, last)
                start, count = file.document_start(first), int(sizes.sum())
                writer.add_documents(file.read(start, count), sizes)
                progress(count)
        return writer.num_documents, writer.num_tokens


def _blocks(file: TokenFile) -> Iterator[tuple[int, int]]:
    """Ranges of documents of about ``_BLOCK`` tokens, at least one document each."""
    for outer in range(0, file.num_documents, _DOCUMENTS):
        ends = np.cumsum(file.document_sizes(outer, min(outer + _DOCUMENTS, file.num_documents)))
        first, before = 0, 0
        while first < len(ends):
            last = max(first + 1, int(np.searchsorted(ends, before + _BLOCK, side="right")))
            yield outer + first, outer + last
            first, before = last, int(ends[last - 1])
