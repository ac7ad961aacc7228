"""The distinct words of a text, as a byte-level BPE divides it, and how often each occurs: all that training merges needs."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from megarewarm.data.text.fast_bpe import FastBPE

MOST_WORDS = 4_000_000
"""Distinct words in memory, some hundred bytes each. Past it the rarest are left out (lossy counting, Manku, Motwani 2002)."""
_RUST_HEX = re.compile(r"\\x\{([0-9a-f]+)\}")


@dataclass(frozen=True)
class WordCounts:
    """``counts``: words in GPT-2's letters, one a byte, with their occurrences; added tokens of the tokenizer are none.
    ``left_out``: occurrences of rare words that were left out, at least."""

    counts: dict[str, int]
    left_out: int = 0

    @property
    def bytes(self) -> int:
        """Of all occurrences that were counted."""
        return sum(len(word) * count for word, count in self.counts.items())


def count_words(
    texts: Iterable[str],
    fast: FastBPE,
    pre_tokenizer: Any,
    on_text: Callable[[], object] = lambda: None,
    most: int = MOST_WORDS,
) -> WordCounts:
    """The words of ``texts``, which are divided by the pattern of ``fast``; each distinct one is then divided again, and turned
    into letters, by ``pre_tokenizer`` of 'tokenizers', whose Unicode version may be another. ``on_text``: called after each
    text. Memory: a text, and ``most`` words."""
    pattern = _RUST_HEX.sub(lambda code: f"\\U{int(code[1], 16):08x}", fast.pattern)
    words = importlib.import_module("regex").compile(pattern)  # which tiktoken, and so the fast path, needs
    found: Counter[str] = Counter()
    left_out = rare = 0
    for text in texts:
        for segment, is_added in fast.segments(text):
            if not is_added:
                found.update(words.findall(segment))
            while len(found) > most:
                rare += 1
                before = found.total()
                found = Counter({word: count for word, count in found.items() if count > rare})
                left_out += before - found.total()
        on_text()
    counts: Counter[str] = Counter()
    for word, count in found.items():
        if word not in fast.added:
            for letters, _ in pre_tokenizer.pre_tokenize_str(word):
                counts[letters] += count
    return WordCounts(dict(counts), left_out)
