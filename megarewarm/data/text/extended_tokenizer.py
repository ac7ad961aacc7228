"""A byte-level BPE with more tokens: merges continued on new text (arXiv 2512.03989), and special tokens.

Every old id keeps its token, and each new token is reached by merges, because its merge is the next one of a training that
goes on where the old one stopped. Tokens that are merely appended to a vocabulary are often in the way of none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AnySet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarewarm.data.text.byte_ranks import pairs_to_list, token_bytes
from megarewarm.data.text.continued_merges import continue_merges
from megarewarm.data.text.end_of_document import TEMPLATES, TOKENIZER_FILES, beside
from megarewarm.data.text.fast_bpe import FastBPE, NotCovered
from megarewarm.data.text.tokenizers import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from megarewarm.data.text.word_counts import WordCounts, count_words
from megarewarm.errors import UserError

_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@dataclass(frozen=True)
class TextLengths:
    """Of one text: ``bytes`` of its words, and the ``tokens`` that they are."""

    bytes: int
    tokens: int

    @property
    def bytes_per_token(self) -> float:
        """0 for no text."""
        return self.bytes / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class Extended:
    """A tokenizer.json's ``content``, ``first`` the first new id. ``merged`` and ``special``: the new tokens, in the order of
    their ids. ``parts``: how many of ``merged`` the new text has only as parts of longer ones; ``pruned``: tokens that it does
    not have at all. ``least``: how often the rarest pair occurred that was merged."""

    content: dict[str, Any]
    first: int
    merged: list[str]
    special: list[str]
    parts: int
    pruned: list[str]
    least: int

    @property
    def size(self) -> int:
        """Ids in all."""
        return self.first + len(self.merged) + len(self.special)


class Base:
    """The tokenizer to extend. Raises ``UserError`` for one that is no byte-level BPE of a known kind (``fast_bpe.py``)."""

    def __init__(self, name: str | Path, special: Sequence[str] = ()) -> None:
        """``special``: tokens that are to be added, which divide texts before all else."""
        tokenizer = load_tokenizer(name)
        if not isinstance(tokenizer, HuggingFaceTokenizer):
            raise UserError(f"{tokenizer.path}: a sentencepiece model can't be extended; a byte-level BPE (tokenizer.json) can")
        if tokenizer.fast is None:
            raise UserError(f"{tokenizer.notes[-1]}; only tokenizers that the fast path covers can be extended")
        self.tokenizer = tokenizer
        self.content: dict[str, Any] = json.loads(tokenizer.content)
        self.special = list(special)
        self.size = tokenizer.vocab_size
        for i, token in enumerate(special):
            if token in special[:i]:
                raise UserError(f"--tokens: {token!r} is listed twice; leave it out")
            if token in tokenizer.vocabulary:
                raise UserError(f"--tokens: {token!r} is a token of {tokenizer.path} already; leave it out")
            if not token or token != token.strip():
                raise UserError(f"--tokens: {token!r} is empty or has spaces around it; take them away")
        try:
            self._fast = FastBPE(self._with_special(self.content, self.size))
        except NotCovered as error:
            raise UserError(f"--tokens: {error}; leave it out") from error

    def words(self, texts: Iterable[str], on_text: Callable[[], object] = lambda: None) -> WordCounts:
        """The words of ``texts``."""
        return count_words(texts, self._fast, library(self.content).pre_tokenizer, on_text)

    def extended(
        self, words: WordCounts, add: int, least_count: int = 1, on_merge: Callable[[], object] = lambda: None
    ) -> Extended:
        """The tokenizer with ``add`` tokens more, merged on ``words``, and the special ones. Raises ``UserError`` where the
        words have fewer pairs that occur ``least_count`` times."""
        vocabulary, first = self.content["model"]["vocab"], self.size
        model = library(self.content).model
        strings = {number: token for token, number in vocabulary.items()}
        split = [_ids(model, word) for word in words.counts]
        merges = continue_merges(split, [*words.counts.values()], strings, first, add, least_count, on_merge)
        if len(merges) < add:
            raise UserError(
                f"the new text gives {len(merges):,} tokens that occur {least_count:,} times or more, not {add:,}: use more "
                f"text, or --add {len(merges)}"
            )
        pairs: list[tuple[str, str]] = []
        for number, merge in enumerate(merges, first):
            pairs.append((strings[merge.left], strings[merge.right]))
            strings[number] = "".join(pairs[-1])
        pruned = list[str]()
        while True:
            content = self._with(pairs)
            used = _used(words, content)
            pairs, unused = prune(pairs, used)
            if not unused:
                break
            pruned += unused
        merged = [left + right for left, right in pairs]
        parts = sum(token not in used for token in merged)
        return Extended(content, first, merged, self.special, parts, pruned, min((each.times for each in merges), default=0))

    def _with(self, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """The tokenizer.json with the merges ``pairs`` after its own, and the special tokens after their results."""
        content = self._with_special(self.content, self.size + len(pairs))
        model = content["model"]
        as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)  # as older versions of the library write them
        content["model"] = model | {
            # 'tokenizers' counts the ids of added tokens on from the vocabulary's, unless they are in it
            "vocab": model["vocab"]
            | {token["content"]: token["id"] for token in content["added_tokens"]}
            | {left + right: number for number, (left, right) in enumerate(pairs, self.size)},
            "merges": [*model["merges"], *_listed(pairs, as_text)],
        }
        if model.get("ignore_merges"):
            while more := pairs_to_list(content["model"], {token["content"] for token in content["added_tokens"]}):
                content["model"]["merges"] += _listed(more, as_text)
        return content

    def _with_special(self, content: dict[str, Any], first: int) -> dict[str, Any]:
        new = [{"id": number, "content": token} | _FLAGS for number, token in enumerate(self.special, first)]
        return content | {"added_tokens": [*(content.get("added_tokens") or []), *new]}


def _used(words: WordCounts, content: dict[str, Any]) -> set[str]:
    """The tokens that the tokenizer.json ``content`` makes of ``words``."""
    model = library(content).model
    return {token.value for word in words.counts for token in model.tokenize(word)}


def prune(pairs: Sequence[tuple[str, str]], used: AnySet[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """``pairs`` without those whose token is not ``used`` and no part of another one's, again and again; and those tokens."""
    kept, pruned = list(pairs), list[str]()
    while True:
        parts = {part for pair in kept for part in pair}
        unused = {left + right for left, right in kept if left + right not in used | parts}
        if not unused:
            return kept, pruned
        pruned += sorted(unused)
        kept = [pair for pair in kept if "".join(pair) not in unused]


def lengths(words: WordCounts, content: dict[str, Any]) -> TextLengths:
    """What the tokenizer.json ``content`` makes of ``words``."""
    model = library(content).model
    return TextLengths(words.bytes, sum(count * len(model.tokenize(word)) for word, count in words.counts.items()))


def library(content: dict[str, Any]) -> Any:
    """The ``Tokenizer`` of 'tokenizers'."""
    from tokenizers import Tokenizer as Library

    return Library.from_str(json.dumps(content))


def files_of(base: Tokenizer, extended: Extended, folder: Path) -> dict[str, bytes]:
    """The files for ``folder``: the tokenizer.json and what lies beside ``base`` and is still true, so that transformers loads
    it as it is. Raises ``UserError`` where the fast path would not give the ids of 'tokenizers'."""
    content = json.dumps(extended.content, ensure_ascii=False, indent=1).encode()
    if (new := HuggingFaceTokenizer(folder / "tokenizer.json", content, None)).fast is None:
        raise UserError(f"{new.notes[-1]}; nothing was written")
    settings = beside(base.path).without_places() | {"tokenizer_class": "PreTrainedTokenizerFast"}
    files = {"tokenizer.json": content, "tokenizer_config.json": json.dumps(settings, ensure_ascii=False, indent=2).encode()}
    if base.path.name in TOKENIZER_FILES:
        files |= {name: path.read_bytes() for name in TEMPLATES if (path := base.path.with_name(name)).is_file()}
    return files


def shown(token: str) -> str:
    """A token of the vocabulary as text, for people."""
    return (token_bytes(token) or token.encode()).decode(errors="replace")


def _ids(model: Any, word: str) -> list[int]:
    return [token.id for token in model.tokenize(word)]


def _listed(pairs: Iterable[tuple[str, str]], as_text: bool) -> list[Any]:
    return [f"{left} {right}" if as_text else [left, right] for left, right in pairs]


def pieces_of(old: HuggingFaceTokenizer, new: HuggingFaceTokenizer, ids: Iterable[int]) -> list[list[int]]:
    """The ids that ``old`` gives the text of each of ``ids`` of ``new``; none where that is no token."""
    model = library(json.loads(old.content)).model
    added = {token["content"] for token in json.loads(new.content).get("added_tokens") or []}
    found: list[list[int]] = []
    for number in ids:
        token = new.token(number)
        if token is None:
            found.append([])
        elif token in added:
            found.append(old.encode_batch([token], threads=1)[0].tolist())
        else:
            found.append(_ids(model, token))
    return found
