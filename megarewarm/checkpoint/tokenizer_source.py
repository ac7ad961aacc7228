"""The tokenizer of a checkpoint: its file, and the ids that begin and end texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from megarewarm.data.files.tokenizer_identity import TokenizerIdentity
from megarewarm.data.text.end_of_document import TOKENIZER_FILES
from megarewarm.data.text.hub_tokenizer import local_tokenizer
from megarewarm.data.text.tokenizers import Tokenizer, load_tokenizer
from megarewarm.errors import UserError

ROLES = ("bos", "eos", "pad")


@dataclass(frozen=True)
class TokenizerSource:
    """``file``: the tokenizer, None if none is known; ``eod``: the id that ends the documents of the data that were trained
    on; ``stated``: ids of 'bos', 'eos' and 'pad' in a config.json that the weights come with, None for null."""

    file: Path | None = None
    eod: int | None = None
    stated: Mapping[str, int | None] = field(default_factory=dict)

    def over(self, older: TokenizerSource) -> TokenizerSource:
        """This one, completed from ``older``, except for the end of documents, which depends on the data."""
        return replace(self, file=self.file or older.file, stated=self.stated or older.stated)


def tokenizer_files_in(folder: Path) -> list[Path]:
    """The tokenizers that lie in a folder as transformers writes it, the preferred one first."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def loaded(path: str | Path) -> Tokenizer:
    """The tokenizer at ``path``, loaded once while its file is unchanged. Raises ``UserError`` as ``load_tokenizer``."""
    found = Path(path)
    if found.is_dir() and (files := tokenizer_files_in(found)):
        found = files[0]
    try:
        stamp = found.stat()
    except OSError:
        return load_tokenizer(path)
    return _loaded(str(found), stamp.st_mtime_ns, stamp.st_size)


@lru_cache(maxsize=8)
def _loaded(path: str, modified: int, size: int) -> Tokenizer:
    return load_tokenizer(path)


def named_tokenizer(name: str | Path, key: str) -> Path:
    """The tokenizer that ``key`` names: a file, in a folder, or on the hub. Raises ``UserError`` where it can't be read."""
    name = local_tokenizer(name)
    if not name.exists():
        raise UserError(f"{name.absolute()}: no such tokenizer file or folder, which {key} names")
    try:
        return loaded(name).path
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def readable_tokenizer(name: object) -> Path | None:
    """The file of tokenizer ``name``, if it exists and can be read."""
    try:
        return loaded(name).path if isinstance(name, str) else None
    except UserError:
        return None


def still_there(tokenizers: Sequence[TokenizerIdentity]) -> Path | None:
    """The file of one of the ``tokenizers`` of token files, if it exists unchanged."""
    for known in tokenizers:
        path = readable_tokenizer(known.file)
        if path is not None and loaded(path).fingerprint() == known.fingerprint:
            return path
    return None


def stated_ids(config: Mapping[str, Any]) -> dict[str, int | None]:
    """The ids in a config.json; of several ends the first, None for null."""
    found: dict[str, int | None] = {}
    for role in ROLES:
        value = config.get(f"{role}_token_id", -1)
        value = value[0] if isinstance(value, list) and value else value
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
            found[role] = value
    return found
