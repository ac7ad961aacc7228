"""Vocabulary and merges of a byte-level BPE as tiktoken's core takes them: ranks of byte strings.

'tokenizers' merges the pairs that the file lists, the first of the list first; tiktoken merges any two neighbours whose bytes
together are a token, the token of the lowest rank first. With ``ignore_merges`` a word that is a token is taken whole, as
tiktoken always does.

When the two are the same: if tiktoken ever has neighbours l, r whose bytes are those of a token t, no merge crossed their
ends, and each merge within was the best of these bytes. So tiktoken has l, r also if it is given the bytes of t alone: they are
the last two parts of t, and only those pairs are ever merged. If the file lists each of them, in the order of the tokens'
ranks, both merge the same pairs in the same order; other pairs in the file, as Llama 3's has, never become neighbours. A token
whose bytes alone are never two parts (some of Llama 3's) is reached as a whole word only.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from megarewarm.data.text.word_patterns import NotCovered

_Ranks = tuple[dict[bytes, int], list[int], int, dict[tuple[bytes, bytes], int]]


def letters() -> dict[int, str]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the rest for the code points from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


# letter -> its byte as Latin-1; what is no letter can't be written in Latin-1 afterwards
_TO_BYTES = {code: "\uffff" for code in range(256)} | {ord(letter): chr(byte) for byte, letter in letters().items()}


def token_bytes(token: str) -> bytes | None:
    """The bytes of a vocabulary's token; None where it is not written in the letters."""
    try:
        return token.translate(_TO_BYTES).encode("latin-1")
    except UnicodeEncodeError:
        return None


def byte_ranks(model: dict[str, Any], added: Collection[str] = ()) -> tuple[dict[bytes, int], list[int]]:
    """(bytes -> rank, rank -> id) of a tokenizer.json's ``model``: the bytes first, then what merges make in their order, which
    is their priority, then tokens that are whole words only, but for those ``added``, which no word is. Raises ``NotCovered``
    where tiktoken would merge otherwise."""
    ranks, ids, first, listed = _ranks(model, added)
    _require_same_merges(ranks, first, listed, bool(model.get("ignore_merges")))
    return ranks, ids


def pairs_to_list(model: dict[str, Any], added: Collection[str] = ()) -> list[tuple[str, str]]:
    """The merges to list in addition, so that tiktoken merges ``model`` alike: of each token that was a whole word only, the
    two parts that later merges make of it, if they are two by now. Empty but where words are taken whole."""
    ranks, _, first, listed = _ranks(model, added)
    letter = letters()
    found = []
    for data, rank in ranks.items():
        if rank >= first and len(parts := _last_parts(data, ranks)) == 2 and (parts[0], parts[1]) not in listed:
            left, right = ("".join(letter[byte] for byte in part) for part in parts)
            found.append((left, right))
    return found


def _ranks(model: dict[str, Any], added: Collection[str]) -> _Ranks:
    """(bytes -> rank, rank -> id, the first rank that is no byte, listed pair -> its place in the file)."""
    vocabulary = model["vocab"]
    ranks: dict[bytes, int] = {}
    ids: list[int] = []
    for byte, letter in letters().items():
        if letter not in vocabulary:
            if byte in (0xC0, 0xC1) or byte >= 0xF5:
                continue  # never in UTF-8
            raise NotCovered(f"byte {byte} is not in the vocabulary")
        ranks[bytes([byte])] = len(ids)
        ids.append(vocabulary[letter])
    first = len(ids)
    listed: dict[tuple[bytes, bytes], int] = {}
    for place, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        token = left + right
        if token not in vocabulary:
            raise NotCovered(f"merge {token!r} is not in the vocabulary")
        first_part, second_part = token_bytes(left), token_bytes(right)
        if first_part is None or second_part is None:
            raise NotCovered(f"merge {token!r}, which is not of bytes")
        if listed.setdefault((first_part, second_part), place) != place:
            raise NotCovered(f"merge {token!r}, which is listed twice")
        if ranks.setdefault(first_part + second_part, len(ids)) == len(ids):
            ids.append(vocabulary[token])
    if model.get("ignore_merges"):
        for token, number in vocabulary.items():
            data = token_bytes(token) if token not in added else None
            if data and ranks.setdefault(data, len(ids)) == len(ids):
                ids.append(number)
    return ranks, ids, first, listed


def _require_same_merges(ranks: dict[bytes, int], first: int, listed: dict[tuple[bytes, bytes], int], whole: bool) -> None:
    """Raises ``NotCovered`` unless ``listed``, pair -> place, holds the last two parts of each token from rank ``first`` on, in
    the order of ranks. Tokens that are never two parts are allowed where a word that is a token is taken ``whole``."""
    before = -1
    for data, rank in ranks.items():
        if rank < first:
            continue
        parts = _last_parts(data, ranks)
        if len(parts) != 2:
            if whole:
                continue
            raise NotCovered(f"token {data!r}, which merges don't make of its bytes")
        place = listed.get((parts[0], parts[1]))
        if place is None:
            raise NotCovered(f"token {data!r}, which the earlier merges make of other parts than the file's")
        if place < before:
            raise NotCovered(f"merge {parts[0]!r} {parts[1]!r}, which comes too early in the file")
        before = place


def _last_parts(data: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """``data`` merged as tiktoken does until two parts are left, or more which don't merge."""
    none = len(ranks)
    parts = [data[i : i + 1] for i in range(len(data))]
    of_pair = [ranks.get(data[i : i + 2], none) for i in range(len(data) - 1)]
    while len(of_pair) > 1:
        best = min(of_pair)
        if best == none:
            break
        i = of_pair.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del of_pair[i]
        if i:
            of_pair[i - 1] = ranks.get(parts[i - 1] + parts[i], none)
        if i < len(of_pair):
            of_pair[i] = ranks.get(parts[i] + parts[i + 1], none)
    return parts
