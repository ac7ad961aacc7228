"""The manifest beside a token file: its tokenizer, and the token that ends its documents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from megarewarm.data.files.file_bytes import find_bin
from megarewarm.data.files.tokenizer_identity import TokenizerIdentity
from megarewarm.errors import UserError


@dataclass(frozen=True)
class Made:
    """``says``: a clause that names a thing and its tokenizer, for a message; ``end``: id of the token that ends documents."""

    says: str
    tokenizer: TokenizerIdentity
    end: int | None = None


def manifest_of(path: Path) -> dict[str, Any] | None:
    """The manifest of the token file ``path`` (the .bin, or what its shards are called); None if there is none, or something
    else is called so. Raises ``UserError`` for one that counts other tokens: either file may be cut off, or another's."""
    manifest = path.with_suffix(".json")
    try:
        said = json.loads(manifest.read_bytes())
        if not isinstance(said, dict):
            return None
        counted = int(said["tokens"]) * np.dtype(said["dtype"]).itemsize if said.keys() >= {"tokens", "dtype"} else None
    except (OSError, ValueError, TypeError):
        return None
    size = sum(part.stat().st_size for part in find_bin(str(path.with_suffix(""))))
    if counted is not None and size and size != counted:
        raise UserError(
            f"{manifest}: says {said['tokens']} tokens of {said['dtype']}, {counted} bytes; {path.name} has {size}: it is "
            f"{'truncated' if size < counted else 'too long'}, or another file; copy both again, or remove the manifest if the "
            f"token file is right"
        )
    return said


def made_by(path: Path) -> Made | None:
    """The origin of the token file ``path`` (the .bin), as far as its manifest records it."""
    said = manifest_of(path)
    try:
        tokenizer = TokenizerIdentity.model_validate((said or {})["tokenizer"])
    except (KeyError, TypeError, ValidationError):
        return None
    end = (said or {}).get("eod")
    number = end.get("id") if isinstance(end, dict) else None
    clause = f"{path} was made with the tokenizer {tokenizer.file}"
    return Made(clause, tokenizer, number if isinstance(number, int) else None)


def refuse_other_tokenizers(found: Sequence[Made]) -> None:
    """Raise ``UserError`` naming the first of ``found`` whose tokenizer gives other ids than one before it."""
    kinds: list[Made] = []
    for one in found:
        if any(one.tokenizer == before.tokenizer for before in kinds):
            continue
        for before in kinds:
            if not one.tokenizer.agrees_with(before.tokenizer):
                raise UserError(
                    f"{one.says}, {before.says}, which gives other ids: preprocess the text of one of them again, or name the "
                    f"right file (without its manifest, the .json beside it, a token file is taken as it is)"
                )
        kinds.append(one)
