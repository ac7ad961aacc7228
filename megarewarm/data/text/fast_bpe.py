"""Byte-level BPE through tiktoken's core, for tokenizer.json files of GPT-2's kind: the same ids as 'tokenizers', several times
as fast.

Covered is the structure of GPT-2's and GPT-NeoX's tokenizers: byte-level BPE with GPT-2's pattern, NFC or no normalisation,
added tokens without flags that are their own NFC, and merges that are all reached from the bytes of their token. Every key of
the file is known to be computed, or to have no effect on ids; anything else, and any difference on the tokenizer's own
vocabulary and added tokens, leaves the text to 'tokenizers'.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

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
_FORMS: tuple[Literal["NFC", "NFD", "NFKC"], ...] = ("NFC", "NFD", "NFKC")
# Keys of the file, and the parts that do nothing to ids where no special tokens are asked for and nothing is cut or padded.
_KEYS = {
    "version",
    "truncation",
    "padding",
    "added_tokens",
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "decoder",
    "model",
}
_OF_ADDED = {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"}
_OF_BYTE_LEVEL = {"type", "add_prefix_space", "trim_offsets", "use_regex"}
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
    """The tokenizer has a feature that the fast path does not support; the message names it."""


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
        # that library's own, whose Unicode version decides which marks change places
        self._compose = NFC().normalize_str if content.get("normalizer") is not None else None
        if changed := [token for token in normalized if self._compose is not None and self._compose(token) != token]:
            raise NotCovered(f"added token {changed[0]!r}, which NFC changes")
        self._ids = np.array(ids, np.uint32)
        self._ranks_of = Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}).encode_to_numpy
        self._before = _alternation([token["content"] for token in added if not token.get("normalized", True)])
        self._after = _alternation(normalized)

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


def first_difference(
    fast: FastBPE, slow: Callable[[str], npt.NDArray[np.uint32]], vocabulary: Iterable[str], others: Iterable[str] = ()
) -> str | None:
    """A text on which the two differ, of ``others`` and of words of ``vocabulary`` one after another and on lines; None where
    they agree."""
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
    return next((text for text in others if not np.array_equal(fast.encode(text), slow(text))), None)


def texts_around(tokens: Iterable[str]) -> list[str]:
    """Each of ``tokens`` in company, as itself, composed and decomposed: that decides where an added token begins and ends."""
    forms = dict.fromkeys(
        form for token in tokens for form in (token, *(unicodedata.normalize(kind, token) for kind in _FORMS))
    )
    return [text.format(form) for form in forms for text in ("{0}", "a{0}b", " {0} ", "{0}{0}", "e{0}\u0301\n{0}  1")]


def _require_structure(content: dict[str, Any]) -> None:
    _require_known("", content, _KEYS)
    normalizer = content.get("normalizer")
    if normalizer is not None and normalizer != {"type": "NFC"}:
        raise NotCovered(f"normalizer {normalizer.get('type')}")
    before = content.get("pre_tokenizer") or {}
    if before.get("type") != "ByteLevel" or before.get("add_prefix_space") is not False or not before.get("use_regex", True):
        raise NotCovered(f"pre-tokenizer {before.get('type')}, expected ByteLevel with GPT-2's pattern and no added space")
    _require_known("pre_tokenizer.", before, _OF_BYTE_LEVEL)
    model = content["model"]
    _require_known("model.", model, {*_PLAIN_MODEL, "vocab", "merges"})
    for key, allowed in _PLAIN_MODEL.items():
        # 'type' is missing in files of the library's first versions
        if model.get(key, "BPE" if key == "type" else None) not in allowed:
            raise NotCovered(f"model.{key} {model.get(key)!r}")
    contents = set()
    for token in content.get("added_tokens") or []:
        name = token["content"]
        _require_known(f"added token {name!r}: ", token, _OF_ADDED)
        if token.get("single_word") or token.get("lstrip") or token.get("rstrip"):
            raise NotCovered(f"added token {name!r} with conditions")
        if not name or name in contents or model["vocab"].get(name, token["id"]) != token["id"]:
            raise NotCovered(f"added token {name!r}, which is empty, or has two ids")
        contents.add(name)


def _require_known(where: str, found: Iterable[str], known: set[str]) -> None:
    if unknown := sorted(set(found) - known):
        raise NotCovered(f"{where}{unknown[0]}, which is not known here")


def _ranks(model: dict[str, Any]) -> tuple[dict[bytes, int], list[int]]:
    """(bytes -> rank, rank -> id): the 256 bytes first, then the merges in their order, which is their priority."""
    byte_of = {letter: byte for byte, letter in _letters().items()}
    vocabulary = model["vocab"]
    ranks: dict[bytes, int] = {}
    ids: list[int] = []
    parts: list[tuple[bytes, bytes]] = []
    for letter, byte in byte_of.items():
        if letter not in vocabulary:
            if byte in (0xC0, 0xC1) or byte >= 0xF5:
                continue  # never in UTF-8
            raise NotCovered(f"byte {byte} is not in the vocabulary")
        ranks[bytes([byte])] = len(ids)
        ids.append(vocabulary[letter])
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        token = left + right
        if token not in vocabulary:
            raise NotCovered(f"merge {token!r} is not in the vocabulary")
        if not set(token) <= byte_of.keys():
            raise NotCovered(f"merge {token!r}, which is not of bytes")
        pair = bytes(byte_of[letter] for letter in left), bytes(byte_of[letter] for letter in right)
        data = pair[0] + pair[1]
        if data in ranks:
            raise NotCovered(f"token {token!r}, which two merges make")
        ranks[data] = len(ids)
        ids.append(vocabulary[token])
        parts.append(pair)
    for left_bytes, right_bytes in parts:
        if _merged(left_bytes + right_bytes, ranks) != [left_bytes, right_bytes]:
            raise NotCovered(f"merge {left_bytes!r} {right_bytes!r}, whose parts the earlier merges don't make of its bytes")
    return ranks, ids


def _merged(data: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """``data`` by the merges that come before its own. Where these are a merge's two parts, to merge whatever makes a token, as
    tiktoken does, and to merge those two alone, as 'tokenizers' does, is the same: within the token nothing else becomes
    adjacent.
    """
    own = ranks[data]
    parts = [data[i : i + 1] for i in range(len(data))]
    while len(parts) > 2:
        best, place = own, -1
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1], own)
            if rank < best:
                best, place = rank, i
        if place < 0:
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def _letters() -> dict[int, str]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the rest for the code points from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _longest_run(tokens: list[str]) -> int | None:
    """n where runs of 2, 3, ..., n spaces are all there is of spaces in ``tokens``, None if there are none. Raises
    ``NotCovered`` for other tokens that begin with a space, whose order of precedence is another."""
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
