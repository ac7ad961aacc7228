"""What the manifest beside a token file says of how it was made: by which tokenizer, and what ends its documents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from megarewarm.data.token_file import TokenFile
from megarewarm.data.tokenizer_identity import TokenizerIdentity
from megarewarm.errors import UserError


@dataclass(frozen=True)
class Made:
    """``says``: a clause that names a thing and its tokenizer, for a message; ``end``: id of the token that ends documents."""

    says: str
    tokenizer: TokenizerIdentity
    end: int | None = None


def manifest_of(file: TokenFile) -> dict[str, Any] | None:
    """The manifest of a token file; None where there is none, or one that counts other tokens or documents."""
    try:
        said = json.loads(file.path.with_suffix(".json").read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(said, dict) or said.get("tokens", file.total_tokens) != file.total_tokens:
        return None
    if file.index_path is not None and said.get("documents", file.num_documents) != file.num_documents:
        return None
    return said


def made_by(file: TokenFile) -> Made | None:
    """How a token file was made, as far as its manifest says."""
    said = manifest_of(file)
    try:
        tokenizer = TokenizerIdentity.model_validate((said or {})["tokenizer"])
    except (KeyError, TypeError, ValidationError):
        return None
    end = (said or {}).get("eod")
    number = end.get("id") if isinstance(end, dict) else None
    clause = f"{file.path} was made with the tokenizer {tokenizer.file}"
    return Made(clause, tokenizer, number if isinstance(number, int) else None)


def refuse_other_tokenizers(found: Sequence[Made]) -> None:
    """Raise ``UserError`` naming the first of ``found`` whose tokenizer gives other ids than one before it."""
    for number, one in enumerate(found):
        for before in found[:number]:
            if not one.tokenizer.agrees_with(before.tokenizer):
                raise UserError(
                    f"{one.says}, {before.says}, which gives other ids: preprocess the text of one of them again, or name the "
                    f"right file (without its manifest, the .json beside it, a token file is taken as it is)"
                )
