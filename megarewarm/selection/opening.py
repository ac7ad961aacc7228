"""Token files opened as one corpus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megarewarm.data.files.file_identity import identity_of
from megarewarm.data.files.manifest import Made, made_by, manifest_of, refuse_other_tokenizers
from megarewarm.data.files.token_file import TokenFile, open_tokens
from megarewarm.errors import UserError
from megarewarm.selection.step import Corpus


def open_corpus(paths: Sequence[str]) -> Corpus:
    """Raises ``UserError`` for a file that can't be read, has no documents, is named twice, or was made with another tokenizer
    than one before it."""
    files: list[TokenFile] = []
    for path in paths:
        file = open_tokens(path)
        if file.index_path is None:
            raise UserError(f"{file.path} has no .idx, so no documents to select from: make a .bin/.idx pair of it")
        if any(file.path.resolve() == other.path.resolve() for other in files):
            raise UserError(f"{path} is named twice")
        files.append(file)
    refuse_other_tokenizers(made(files))
    return Corpus(tuple(files), tuple(end_of(file) for file in files))


def made(files: Sequence[TokenFile]) -> list[Made]:
    """What the manifests of ``files`` say of their tokenizers, as far as there are any."""
    return [found for file in files if (found := made_by(file.path)) is not None]


def identity(corpus: Corpus) -> Mapping[str, Any]:
    """What tells this corpus from others: its files' contents, in their order, and the ids that end documents."""
    files = [identity_of(file).model_dump(exclude={"path"}) for file in corpus.files]
    return {"files": files, "ends": list(corpus.ends)}


def end_of(file: TokenFile) -> int | None:
    said = (manifest_of(file.path) or {}).get("eod")
    end = said.get("id") if isinstance(said, dict) else None
    return end if isinstance(end, int) else None
