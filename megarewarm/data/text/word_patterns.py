"""The division of a text into words that a tokenizer.json's pre-tokenizer makes, as one pattern for tiktoken's core.

Covered are GPT-2's (also GPT-NeoX's and OLMo's), the one of GPT-4 with digits in threes (Llama 3, OLMo 2, SmolLM3) or one by
one (Qwen 2 and 3), and GPT-2's after single digits (SmolLM, StarCoder 2). The patterns match the same as the files', with
possessive quantifiers where going back can't help.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any


class NotCovered(Exception):
    """The tokenizer has a feature that the fast path does not support; the message names it."""


@dataclass(frozen=True)
class Words:
    """``pattern`` of words in tiktoken's syntax. ``breaks_after``: a text may be cut after a line break that no white space
    follows, else before one that follows no white space. ``runs``: the pattern where runs of 2 to {most} spaces are added
    tokens, if there is one."""

    pattern: str
    breaks_after: bool
    runs: str | None = None


# GPT-2's division (Radford et al. 2019)
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
_SPACES = r"|\s++$|\s+(?!\S)|\s"
# The same where runs of spaces are added tokens, which divide a text before all else: a run is a word of its own, the white
# space before it ends as at the end of a text, and no other word holds two spaces in a row.
_SPACES_WITH_RUNS = r"|(?:[^\S ]| (?! ))++(?:$|(?=  ))|(?:[^\S ]| (?! ))+(?!\S)|\s"
GPT2 = Words(
    _GPT2 + _SPACES,
    breaks_after=False,
    runs=" {{2,{most}}}|" + (_GPT2 + _SPACES_WITH_RUNS).replace("{", "{{").replace("}", "}}"),
)
# GPT-4's (tiktoken's cl100k_base) as Llama 3's file writes it. White space with line breaks ends at the last of them, so the
# pattern that tiktoken itself has by now, where the end of a text comes first, is another.
_GPT4_IN_FILES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4 = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|DIGITS| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]" + _SPACES
SPLITS = {
    _GPT4_IN_FILES.replace("DIGITS", digits): Words(_GPT4.replace("DIGITS", ours), breaks_after=True)
    for digits, ours in ((r"\p{N}{1,3}", r"\p{N}{1,3}+"), (r"\p{N}", r"\p{N}"))
}
# Every character is in a match, so what is between matches, which one keeps and the other removes, is nothing.
_KEEP_MATCHES = (("Isolated", False), ("Isolated", True), ("Removed", True))
_OF_BYTE_LEVEL = {"type", "add_prefix_space", "trim_offsets", "use_regex"}
_EXPECTED = "expected GPT-2's, Llama 3's, Qwen's or SmolLM's, with no added space"


def words_of(pre_tokenizer: dict[str, Any] | None) -> Words:
    """The words that ``pre_tokenizer`` of a tokenizer.json makes. Raises ``NotCovered``."""
    parts = [pre_tokenizer or {}]
    if parts[0].get("type") == "Sequence":
        require_known("pre_tokenizer.", parts[0], {"type", "pretokenizers"})
        parts = parts[0]["pretokenizers"]
    kinds = [str(part.get("type")) for part in parts]
    uncovered = NotCovered(f"pre-tokenizer {' + '.join(kinds)}, {_EXPECTED}")
    if not kinds or kinds[-1] != "ByteLevel" or parts[-1].get("add_prefix_space") is not False:
        raise uncovered
    require_known("pre_tokenizer.", parts[-1], _OF_BYTE_LEVEL)
    divides = parts[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and divides:
        return GPT2
    if kinds == ["Digits", "ByteLevel"] and divides and parts[0].get("individual_digits") is True:
        require_known("pre_tokenizer.", parts[0], {"type", "individual_digits"})
        return _single_digits()
    if kinds == ["Split", "ByteLevel"] and not divides:
        split = parts[0]
        require_known("pre_tokenizer.", split, {"type", "pattern", "behavior", "invert"})
        words = SPLITS.get(split["pattern"].get("Regex"))
        if words is not None and (split.get("behavior"), split.get("invert")) in _KEEP_MATCHES:
            return words
        raise NotCovered("pre-tokenizer Split with a pattern of its own")
    raise uncovered


@lru_cache(maxsize=1)
def _single_digits() -> Words:
    """A digit is cut out before GPT-2's division: it takes no space, and the white space before it ends as at the end of a
    text. Digits are those of 'tokenizers', whose Unicode version for them may be newer than that of patterns."""
    try:
        from tokenizers.pre_tokenizers import Digits
    except ImportError as error:
        raise NotCovered(f"{error.name} is not installed") from error
    points = [*range(0x80, 0xD800), *range(0xE000, 0x20000)]
    parts = Digits(individual_digits=True).pre_tokenize_str("".join("a" + chr(point) for point in points))
    digit = r"\p{N}" + "".join(rf"\x{{{ord(part):x}}}" for part, _ in parts if len(part) == 1 and part != "a")
    letters_and_others = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++|[DIGIT]| ?[^\s\p{L}DIGIT]++"
    return Words((letters_and_others + r"|\s++(?:$|(?=[DIGIT]))|\s+(?!\S)|\s").replace("DIGIT", digit), breaks_after=False)


def require_known(where: str, found: Iterable[str], known: set[str]) -> None:
    """Raises ``NotCovered`` for a key of ``found`` that is not ``known``: it might change ids."""
    if unknown := sorted(set(found) - known):
        raise NotCovered(f"{where}{unknown[0]}, which is not known here")
