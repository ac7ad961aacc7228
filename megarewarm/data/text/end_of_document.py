"""The token that ends a document: one that the tokenizer marks as special, never a word that merely looks like an end."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarewarm.errors import UserError

END_OF_DOCUMENT = "<|endoftext|>"

# Ends of texts in published tokenizers. Ends of turns of a conversation (<|im_end|>, <|eot_id|>, <end_of_turn>) are none.
_KNOWN = (
    *(END_OF_DOCUMENT, "<|end_of_text|>", "<|end_of_document|>", "</s>", "<eos>", "<EOS>", "[EOS]", "<|eos|>", "<EOS_TOKEN>"),
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
# The tokenizer's file in a folder as transformers writes it; what lies beside it belongs to it.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json")
TEMPLATES = ("chat_template.jinja", "chat_template.json")
# keys of tokenizer_config.json: code and places of other programs, and what tokenizer.json states itself
_PLACES = (
    "auto_map",
    "name_or_path",
    "tokenizer_file",
    "vocab_file",
    "added_tokens_decoder",
    "split_special_tokens",
    "backend",
)
_SHOWN = 8  # special tokens that a message names


@dataclass(frozen=True)
class End:
    """The token that ends documents, and a description of how it was chosen."""

    id: int
    token: str
    why: str

    def __str__(self) -> str:
        return f"{self.token!r} (id {self.id}) ends a document: {self.why}"


@dataclass(frozen=True)
class Beside:
    """What files beside a tokenizer's say of it: ``settings`` are tokenizer_config.json's, over special_tokens_map.json's."""

    file: str | None
    settings: Mapping[str, Any]

    def named(self, role: str) -> str | None:
        """The token of a role, such as ``eos_token``; None if none is given."""
        value = self.settings.get(role)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) else None

    def without_places(self) -> dict[str, Any]:
        """The settings that hold for a copy of the tokenizer.json somewhere else."""
        return {key: value for key, value in self.settings.items() if key not in _PLACES}

    @property
    def special(self) -> set[str]:
        """Tokens that are marked as special."""
        added = self.settings.get("added_tokens_decoder")
        entries = added.values() if isinstance(added, dict) else ()
        return {str(entry.get("content")) for entry in entries if isinstance(entry, dict) and entry.get("special")}


def beside(path: Path) -> Beside:
    """The files beside the tokenizer file ``path``, if that is named as transformers names it. Raises ``UserError`` for a
    file that can't be read."""
    settings: dict[str, Any] = {}
    file = None
    if path.name in TOKENIZER_FILES:
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            other = path.with_name(name)
            if other.is_file():
                try:
                    read = json.loads(other.read_bytes())
                except (OSError, ValueError) as error:
                    raise UserError(f"{other}: not readable as JSON ({error}); repair it, or take it away") from error
                if not isinstance(read, dict):
                    raise UserError(f"{other}: expected a JSON object; repair it, or take it away")
                settings |= {key: value for key, value in read.items() if value is not None}
                file = name
    return Beside(file, settings)


def choose_end(path: Path, vocabulary: Mapping[str, int], special: Collection[str], stated: str | None, by: str) -> End:
    """The end of a document of the tokenizer in ``path``.

    ``special``: the tokens that it says are special; ``stated``: the one it calls the end, as ``by`` has it. That one is taken
    if it is known to end texts, or if no other special token is; else the one special token that is known to. Raises
    ``UserError`` where there is none, or a choice.
    """
    remedy = "say which token ends a document (--eod-token of megarewarm prepare, data.eod of a run)"
    known = [token for token in _KNOWN if token in special and token in vocabulary]
    if stated is not None:
        if stated not in vocabulary:
            raise UserError(f"{path}: {by} says that {stated!r} ends a text, which is no token of it: {remedy}")
        others = [token for token in known if token != stated]
        if stated in _KNOWN or not others:
            return End(vocabulary[stated], stated, f"{by} says so")
        known = [stated, *others]
    if len(known) == 1:
        return End(vocabulary[known[0]], known[0], f"a special token of {path.name}")
    if known:
        raise UserError(f"{path} has several special tokens that could end a document, {_listed(known)}: {remedy}")
    ordinary = [token for token in _KNOWN if token in vocabulary]
    has = f"{_listed(ordinary)} is an ordinary token of it" if ordinary else f"special are {_listed(sorted(special)) or 'none'}"
    raise UserError(f"{path} has no special token that is known to end a document ({has}): {remedy}")


def _listed(tokens: Collection[str]) -> str:
    shown = ", ".join(repr(token) for token in list(tokens)[:_SHOWN])
    return shown + (f" and {len(tokens) - _SHOWN} more" if len(tokens) > _SHOWN else "")
