"""How many bytes of text each id of a tokenizer stands for, so that losses can be given per byte."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megarewarm.data.text.byte_ranks import token_bytes

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what sentencepiece and its followers write for a space
_PROBES = (
    "a",
    "Plain words, 12 of them",
    "two  spaces\nand\ta tab",
    "\xe9 \u20ac \u4f60\u597d \U0001f600",
    " before and after ",
)
"""Texts, in the form NFC, whose tokens must have as many bytes as they."""

Pieces = Sequence[bytes | None]
"""The bytes of each id, None where they are not known from the id alone."""


@dataclass(frozen=True)
class ByteLengths:
    """``lengths``: bytes of UTF-8 that each id stands for, (ids,) int64, -1 where unknown. A token may be a part of a
    character: its bytes count all the same, so that any run of tokens has as many bytes as it contributes to the text.

    ``leading``: (ids,) bool, the ids that begin with the space that the tokenizer puts before each text, which is no byte of
    the text; None if it puts none.
    """

    lengths: npt.NDArray[np.int64]
    leading: npt.NDArray[np.bool_] | None


def spaced(piece: str) -> bytes:
    """A piece of sentencepiece as text."""
    return piece.replace(_SPACE, " ").encode()


def pieces_of(content: Mapping[str, Any], vocabulary: Mapping[str, int], size: int) -> list[bytes | None]:
    """The pieces of a tokenizer.json: of byte-level ones by GPT-2's letters, of those with a sign for the space by that. An
    added token is its own text."""
    kinds = _kinds_of(content)
    model = content.get("model") or {}
    unknown = model.get("unk_token", model.get("unk_id"))
    added = {str(token["content"]) for token in content.get("added_tokens") or []}
    pieces: list[bytes | None] = [None] * size
    for token, number in vocabulary.items():
        if token == unknown or number == unknown:
            continue
        if token in added:
            pieces[number] = token.encode()
        elif "ByteLevel" in kinds:
            pieces[number] = token_bytes(token)
        elif "ByteFallback" in kinds and len(token) == 6 and token.startswith("<0x"):
            pieces[number] = bytes([int(token[3:5], 16)])
        elif kinds & {"Metaspace", _SPACE}:
            pieces[number] = spaced(token)
    return pieces


def is_byte_level(content: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json writes its tokens in GPT-2's letters."""
    return "ByteLevel" in _kinds_of(content)


def _kinds_of(content: Mapping[str, Any]) -> set[str]:
    return set(_kinds([content.get("pre_tokenizer"), content.get("decoder")]))


def _kinds(parts: Sequence[Any]) -> list[str]:
    """The types of pre-tokenizers and decoders, those within sequences too; the sign for the space where one replaces it."""
    found = []
    for part in parts:
        if isinstance(part, dict):
            found.append(str(part.get("type")))
            if part.get("type") == "Replace" and (part.get("pattern") or {}).get("String") == _SPACE:
                found.append(_SPACE)
            found += _kinds([*(part.get("pretokenizers") or ()), *(part.get("decoders") or ())])
    return found


def lengths_of(pieces: Pieces, encode: Callable[[Sequence[str]], Sequence[npt.NDArray[np.uint32]]]) -> ByteLengths | None:
    """The lengths of ``pieces``, compared with what ``encode`` makes of texts; None where a text has other bytes than its
    tokens, but for one space before it."""
    before = set()
    for text, ids in zip(_PROBES, encode(_PROBES), strict=True):
        parts = [pieces[i] for i in ids.tolist()]
        if None in parts:  # a vocabulary without this character
            continue
        found = b"".join(part for part in parts if part is not None)
        if found not in (text.encode(), b" " + text.encode()):
            return None
        if not text.startswith(" "):  # some add none where there is one
            before.add(found != text.encode())
    if len(before) != 1:
        return None
    lengths = np.array([-1 if piece is None else len(piece) for piece in pieces], np.int64)
    leading = np.array([piece is not None and piece[:1] == b" " for piece in pieces])
    return ByteLengths(lengths, leading if before.pop() else None)
