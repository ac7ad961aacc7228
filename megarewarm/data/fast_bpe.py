"""Byte-level BPE through tiktoken's core, for tokenizer.json files of GPT-2's kind: the same ids as 'tokenizers', several times
as fast.

Covered is the structure of GPT-2's and GPT-NeoX's tokenizers: byte-level BPE with GPT-2's pattern, NFC or no normalisation,
added tokens without flags. Anything else, and any difference on the tokenizer's own vocabulary, leaves the text to
'tokenizers'.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

# GPT-2's division of a text into words (Radford et al. 2019), with possessive quantifiers: the same matches, no backtracking.
_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
_PATTERN = _WORDS + r"|\s++$|\s+(?!\S)|\s"
# The same where runs of 2 to {most} spaces are added tokens, which divide a text before all else: a run is a word of its own,
# the white space before it ends as at the end of a text, and no other word holds two spaces in a row.
_PATTERN_WITH_RUNS = (
    r" {{2,{most}}}|"
    + _WORDS.replace("{", "{{").replace("}", "}}")
    + (r"|(?:[^\S ]| (?! ))++(?:$|(?=  ))|(?:[^\S ]| (?! ))+(?!\S)|\s")
)
_PLAIN_MODEL = {
    "type": ("BPE",),
    "dropout": (None, 0, 0.0),
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": (None, False),
    "byte_fallback": (None, False),
    "ignore_merges": (None, False),
}


class NotCovered(Exception):
    """The tokenizer has something that the fast path does not do; the message says what."""


_PIECE = 2**20  # characters that are encoded at a time


class TooLong(ValueError):
    """A text on which the pattern's search runs out of room."""


class FastBPE:
    """The fast path of a tokenizer.json's ``content``. Raises ``NotCovered``, also where tiktoken is not installed."""

    def __init__(self, content: dict[str, Any]) -> None:
        _require_structure(content)
        ranks, ids = _ranks(content["model"])
        try:
            from tiktoken import Encoding
            from tokenizers.normalizers import NFC
        except ImportError as error:
            raise NotCovered(f"{error.name} is not installed") from error
        added = content.get("added_tokens") or []
        self._added = {token["content"]: int(token["id"]) for token in added}
        normalized = [token["content"] for token in added if token.get("normalized", True)]
        pattern = _PATTERN
        if most := _longest_run(normalized):
            pattern = _PATTERN_WITH_RUNS.format(most=most)
            for length in range(2, most + 1):
                # a word that is a token is not taken apart; the merges of two spaces can't apply any more
                rank = ranks.setdefault(b" " * length, len(ids))
                ids[rank:] = [self._added[" " * length], *ids[rank + 1 :]]
            normalized = [token for token in normalized if token.strip(" ")]
        self._ids = np.array(ids, np.uint32)
        self._ranks_of = Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}).encode_to_numpy
        self._before = _alternation([token["content"] for token in added if not token.get("normalized", True)])
        self._after = _alternation(normalized)
        # that library's own, whose Unicode version decides which marks change places
        self._compose = NFC().normalize_str if (content.get("normalizer") or {}).get("type") == "NFC" else None

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        """The ids of ``text``, (t,). Half surrogate pairs, which are no text, raise ``UnicodeEncodeError``; runs of some
        hundred thousand line breaks or tabs are too much for the library's pattern and raise ``TooLong``."""
        pieces: list[npt.NDArray[np.uint32]] = []
        for raw, is_added in _cut(text, self._before):
            if is_added:
                pieces.append(np.array([self._added[raw]], np.uint32))
                continue
            for whole in self._short(raw):
                part = self._compose(whole) if self._compose is not None and not whole.isascii() else whole
                for segment, is_token in _cut(part, self._after):
                    if is_token:
                        pieces.append(np.array([self._added[segment]], np.uint32))
                        continue
                    try:
                        pieces.append(self._ids[self._ranks_of(segment, disallowed_special=())])
                    except ValueError as error:
                        if isinstance(error, UnicodeError):
                            raise
                        raise TooLong(str(error)) from error
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces) if pieces else np.zeros(0, np.uint32)

    def _short(self, text: str) -> Iterator[str]:
        """``text`` in pieces of about a megabyte, so that a book takes no more memory than its ids.

        It is cut before a line break that follows no space: no word of the pattern goes on there, and none that begins there
        looks back; no added token holds a line break, and nothing is composed with one.
        """
        if any("\n" in token for token in self._added):
            yield text
            return
        start = 0
        while len(text) - start > _PIECE:
            cut = text.find("\n", start + _PIECE)
            while cut > 0 and text[cut - 1].isspace():
                cut = text.find("\n", cut + 1)
            if cut < 0:
                break
            yield text[start:cut]
            start = cut
        yield text[start:]


def first_difference(fast: FastBPE, slow: Callable[[str], npt.NDArray[np.uint32]], vocabulary: Iterable[str]) -> str | None:
    """A text on which the two differ, of words of ``vocabulary`` one after another and on lines; None where they agree."""
    from_letter = {letter: byte for byte, letter in _letters().items()}
    texts = []
    for token in vocabulary:
        try:
            texts.append(bytes(from_letter[letter] for letter in token).decode())
        except (KeyError, UnicodeDecodeError):
            continue  # an added token, or a part of a character
    for start in range(0, len(texts), 500):
        for text in ("".join(texts[start : start + 500]), "\n".join(texts[start : start + 500])):
            if not np.array_equal(fast.encode(text), slow(text)):
                single = (t for t in texts[start : start + 500] if not np.array_equal(fast.encode(t), slow(t)))
                return next(single, text[:40])
    return None


def _require_structure(content: dict[str, Any]) -> None:
    normalizer = content.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise NotCovered(f"normalizer {normalizer.get('type')}")
    before = content.get("pre_tokenizer") or {}
    if before.get("type") != "ByteLevel" or before.get("add_prefix_space") or not before.get("use_regex", True):
        raise NotCovered(f"pre-tokenizer {before.get('type')}, expected ByteLevel with GPT-2's pattern and no added space")
    for key, allowed in _PLAIN_MODEL.items():
        if content["model"].get(key) not in allowed:
            raise NotCovered(f"model.{key} {content['model'].get(key)!r}")
    for token in content.get("added_tokens") or []:
        if token.get("single_word") or token.get("lstrip") or token.get("rstrip"):
            raise NotCovered(f"added token {token['content']!r} with conditions")


def _ranks(model: dict[str, Any]) -> tuple[dict[bytes, int], list[int]]:
    """(bytes -> rank, rank -> id): the 256 bytes first, then the merges in their order, which is their priority."""
    byte_of = {letter: byte for byte, letter in _letters().items()}
    vocabulary = model["vocab"]
    ranks: dict[bytes, int] = {}
    ids: list[int] = []
    for letter, byte in byte_of.items():
        if letter not in vocabulary:
            if byte in (0xC0, 0xC1) or byte >= 0xF5:
                continue  # stands in no UTF-8
            raise NotCovered(f"byte {byte} is not in the vocabulary")
        ranks[bytes([byte])] = len(ids)
        ids.append(vocabulary[letter])
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        token = left + right
        if token not in vocabulary:
            raise NotCovered(f"merge {token!r} is not in the vocabulary")
        data = bytes(byte_of[letter] for letter in token)
        if data not in ranks:
            ranks[data] = len(ids)
            ids.append(vocabulary[token])
    return ranks, ids


def _letters() -> dict[int, str]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the rest for the code points from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _longest_run(tokens: list[str]) -> int | None:
    """n where runs of 2, 3, ..., n spaces are all there is of spaces in ``tokens``, None where there are none.

    Raises ``NotCovered`` for other tokens that begin with a space, whose order of precedence is another.
    """
    runs = sorted(len(token) for token in tokens if not token.strip(" "))
    if any(token.startswith(" ") and token.strip(" ") for token in tokens) or runs != [*range(2, len(runs) + 2)]:
        raise NotCovered("added tokens with spaces other than runs of 2, 3, 4, ... of them")
    return runs[-1] if runs else None


def _alternation(tokens: list[str]) -> re.Pattern[str] | None:
    """Matches the longest of ``tokens`` at the leftmost place."""
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))) if tokens else None


def _cut(text: str, pattern: re.Pattern[str] | None) -> Iterator[tuple[str, bool]]:
    """``text`` in pieces: (piece, whether it is a match). Empty pieces are left out."""
    position = 0
    for match in pattern.finditer(text) if pattern is not None else ():
        if match.start() > position:
            yield text[position : match.start()], False
        yield match[0], True
        position = match.end()
    if position < len(text):
        yield text[position:], False
