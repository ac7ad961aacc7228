"""The tokenizer that a GPT-NeoX configuration names: how many tokens it has, and whether it can be data.tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from megarewarm.config.neox_values import NeoxValues
from megarewarm.config.paths import merges_beside
from megarewarm.errors import UserError

KNOWN_ENDS = ("HFTokenizer", "GPT2BPETokenizer")
"""Kinds whose end of a document is the token that data.tokenizer says."""


def tokenizer_size(values: NeoxValues) -> int:
    """The number of tokens. Raises ``UserError`` where it can't be known."""
    kind, name = values.get("tokenizer_type"), values.get("vocab_file")
    if kind == "CharLevelTokenizer":
        return 512
    if name is None:
        raise UserError(
            f"{values.file.name}: 'vocab_file' is missing: the vocabulary's size can't be known (or give padded_vocab_size)"
        )
    if not Path(name).is_file():
        raise values.error("vocab_file", f"{Path(name).absolute()}: no such file, so the vocabulary's size can't be known")
    if kind == "HFTokenizer":
        from tokenizers import Tokenizer

        try:
            return int(Tokenizer.from_file(name).get_vocab_size())
        except Exception as error:  # the library's own class is Exception
            raise values.error("vocab_file", f"{name}: not a tokenizer.json ({str(error).splitlines()[0]})") from error
    if kind == "SPMTokenizer":
        from sentencepiece import SentencePieceProcessor

        return int(SentencePieceProcessor(model_file=name).get_piece_size())
    if kind in ("GPT2BPETokenizer", "HFGPT2Tokenizer"):
        return len(json.loads(Path(name).read_text(encoding="utf-8")))
    raise values.error("tokenizer_type", f"{kind!r} is not known here; give padded_vocab_size")


def usable_tokenizer(values: NeoxValues) -> str | None:
    """``vocab_file`` where data.tokenizer means the same by it; else None, and a note says why."""
    name = values.get("vocab_file")
    if name is None:
        return None
    why = _unusable(values, Path(name))
    if why is None:
        return str(name)
    values.notes.append(
        f"vocab_file: data.tokenizer is not {name}, for {why}; an export has the tokenizer of the start, or the one that the "
        f"manifests of the token files name, or none"
    )
    return None


def _unusable(values: NeoxValues, vocabulary: Path) -> str | None:
    kind = values.get("tokenizer_type")
    if not vocabulary.is_file():
        return "there is no such file"
    if kind == "HFTokenizer":
        return None
    if kind == "SPMTokenizer":
        return None if vocabulary.suffix == ".model" else "sentencepiece models are known by the ending .model"
    if kind != "GPT2BPETokenizer":
        return f"nothing here gives the ids of a {kind}; convert it to a tokenizer.json and give that as data.tokenizer"
    merges, expected = values.get("merge_file"), merges_beside(vocabulary)
    if expected is None:
        return "GPT-2's vocabulary is known by a name that ends in vocab.json, with its merges.txt beside it; rename both"
    if merges is None or not Path(merges).is_file():
        return "its merges are not given as merge_file" if merges is None else f"its merge_file {merges} is not there"
    if not expected.is_file() or not expected.samefile(merges):
        return f"its merges are looked for in {expected}; copy {merges} there"
    return None
