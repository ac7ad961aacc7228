"""Byte-level BPE through tiktoken's core: the same ids as 'tokenizers', several times as fast.

Covered is the structure of the tokenizers of GPT-2, GPT-NeoX, Llama 3, Qwen, OLMo and SmolLM: byte-level BPE with one of the
divisions into words in ``word_patterns.py``, NFC or no normalisation, added tokens without flags that are their own NFC, and
merges that tiktoken makes alike (``byte_ranks.py``). Every key of the file is known to be computed, or to have no effect on
ids; anything else, and any difference on the tokenizer's own vocabulary and added tokens, leaves the text to 'tokenizers'.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megarewarm.data.text.byte_ranks import byte_ranks, token_bytes
from megarewarm.data.text.word_patterns import NotCovered, Words, require_known, words_of

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
_PLAIN_MODEL = {
    "type": ("BPE",),
    "dropout": (None, 0, 0.0),
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": (None, False),
    "byte_fallback": (None, False),
    "ignore_merges": (None, False, True),
}
_PIECE = 2**20  # characters that are encoded at a time


class TooLong(ValueError):
    """A text on which the pattern's search runs out of room."""


class FastBPE:
    """The fast path of a tokenizer.json's ``content``. Raises ``NotCovered``, also where tiktoken is not installed."""

    def __init__(self, content: dict[str, Any]) -> None:
        words = _words_of_known(content)
        added = content.get("added_tokens") or []
        ranks, ids = byte_ranks(content["model"], {token["content"] for token in added})
        try:
            from tiktoken import Encoding
            from tokenizers.normalizers import NFC
        except ImportError as error:
            raise NotCovered(f"{error.name} is not installed") from error
        self.added = {token["content"]: int(token["id"]) for token in added}
        """Added tokens and their ids."""
        normalized = [token["content"] for token in added if token.get("normalized", True)]
        pattern = words.pattern
        self._breaks_after = words.breaks_after
        if most := _longest_run(normalized):
            if words.runs is None:
                raise NotCovered("added tokens of spaces beside another pattern than GPT-2's")
            pattern = words.runs.format(most=most)
            for length in range(2, most + 1):
                # a word that is a token is not taken apart; the merges of two spaces can't apply any more
                rank = ranks.setdefault(b" " * length, len(ids))
                ids[rank:] = [self.added[" " * length], *ids[rank + 1 :]]
            normalized = [token for token in normalized if token.strip(" ")]
        # that library's own, whose Unicode version decides which marks change places
        self._compose = NFC().normalize_str if content.get("normalizer") is not None else None
        if changed := [token for token in normalized if self._compose is not None and self._compose(token) != token]:
            raise NotCovered(f"added token {changed[0]!r}, which NFC changes")
        self.pattern = pattern
        """Of words, in tiktoken's syntax."""
        self._ids = np.array(ids, np.uint32)
        self._ranks_of = Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}).encode_to_numpy
        self._before = _alternation([token["content"] for token in added if not token.get("normalized", True)])
        self._after = _alternation(normalized)

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        """The ids of ``text``, (t,). Half surrogate pairs, which are no text, raise ``UnicodeEncodeError``; runs of some
        hundred thousand line breaks or tabs are too much for the library's pattern and raise ``TooLong``."""
        pieces: list[npt.NDArray[np.uint32]] = []
        for segment, is_added in self.segments(text):
            if is_added:
                pieces.append(np.array([self.added[segment]], np.uint32))
                continue
            try:
                pieces.append(self._ids[self._ranks_of(segment, disallowed_special=())])
            except ValueError as error:
                if isinstance(error, UnicodeError):
                    raise
                raise TooLong(str(error)) from error
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces) if pieces else np.zeros(0, np.uint32)

    def segments(self, text: str) -> Iterator[tuple[str, bool]]:
        """``text``, normalised, in parts that ``pattern`` divides into words, and the added tokens between them (True)."""
        for raw, is_added in _cut(text, self._before):
            if is_added:
                yield raw, True
                continue
            for whole in self._short(raw):
                part = self._compose(whole) if self._compose is not None and not whole.isascii() else whole
                yield from _cut(part, self._after)

    def _short(self, text: str) -> Iterator[str]:
        """``text`` in pieces of about a megabyte, so that a book takes no more memory than its ids.

        It is cut where no word of the pattern goes on, before or after a line break (``Words.breaks_after``), and none looks
        across; no added token holds a line break, and nothing is composed with one.
        """
        if any("\n" in token for token in self.added):
            yield text
            return
        start = 0
        while len(text) - start > _PIECE:
            cut = self._break(text, start + _PIECE)
            if cut is None:
                break
            yield text[start:cut]
            start = cut
        yield text[start:]

    def _break(self, text: str, start: int) -> int | None:
        """Where ``text`` may be cut, at a line break from ``start`` on."""
        while (place := text.find("\n", start)) >= 0:
            other = place + 1 if self._breaks_after else place - 1
            if 0 <= other < len(text) and not text[other].isspace():
                return place + self._breaks_after
            start = place + 1
        return None


def first_difference(
    fast: FastBPE, slow: Callable[[str], npt.NDArray[np.uint32]], vocabulary: Iterable[str], others: Iterable[str] = ()
) -> str | None:
    """A text on which the two differ, of ``others`` and of words of ``vocabulary`` one after another and on lines; None where
    they agree."""
    texts = []
    for token in vocabulary:
        try:
            texts.append((token_bytes(token) or b"").decode())
        except UnicodeDecodeError:
            continue  # a part of a character
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


def _words_of_known(content: dict[str, Any]) -> Words:
    """The words of a tokenizer.json of which nothing else is unknown. Raises ``NotCovered``."""
    require_known("", content, _KEYS)
    normalizer = content.get("normalizer")
    if normalizer is not None and normalizer != {"type": "NFC"}:
        raise NotCovered(f"normalizer {normalizer.get('type')}")
    words = words_of(content.get("pre_tokenizer"))
    model = content["model"]
    require_known("model.", model, {*_PLAIN_MODEL, "vocab", "merges"})
    for key, allowed in _PLAIN_MODEL.items():
        # 'type' is missing in files of the library's first versions
        if model.get(key, "BPE" if key == "type" else None) not in allowed:
            raise NotCovered(f"model.{key} {model.get(key)!r}")
    contents = set()
    for token in content.get("added_tokens") or []:
        name = token["content"]
        require_known(f"added token {name!r}: ", token, _OF_ADDED)
        if token.get("single_word") or token.get("lstrip") or token.get("rstrip"):
            raise NotCovered(f"added token {name!r} with conditions")
        if not name or name in contents or model["vocab"].get(name, token["id"]) != token["id"]:
            raise NotCovered(f"added token {name!r}, which is empty, or has two ids")
        contents.add(name)
    return words


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
