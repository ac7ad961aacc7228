"""The tokenizer beside exported weights: files from which transformers gives exactly the ids of training.

The class is always the one that takes tokenizer.json as it is, because the classes of single models (GPTNeoXTokenizer,
LlamaTokenizer) rebuild normaliser and pre-tokenizer. Settings that add tokens, truncate or split texts differently are left
out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megarewarm.checkpoint.export.replace import new_folder
from megarewarm.checkpoint.tokenizer_source import TokenizerSource, loaded
from megarewarm.config.model import ModelConfig
from megarewarm.data.text.end_of_document import TEMPLATES, TOKENIZER_FILES, beside
from megarewarm.data.text.tokenizers import HuggingFaceTokenizer
from megarewarm.errors import UserError

_COPIED = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_PADS = ("<|padding|>", "<pad>", "<|pad|>", "[PAD]", "<PAD>")


@dataclass(frozen=True)
class ExportedTokenizer:
    """``files`` by name, ``ids`` of 'bos', 'eos' and 'pad' (None if there is none), and notes for the user."""

    files: Mapping[str, bytes]
    ids: Mapping[str, int | None]
    notes: list[str] = field(default_factory=list)


def exported_tokenizer(source: TokenizerSource, model: ModelConfig) -> ExportedTokenizer:
    """The tokenizer files of an export of ``model``, from ``source``. Raises ``UserError`` if it can't be exported."""
    if source.file is None:
        return without_tokenizer(source, "none is named, none is beside the start checkpoint, and the token files name none")
    tokenizer = loaded(source.file)
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise UserError(
            f"{source.file}: a sentencepiece model can't be exported as the tokenizer.json that transformers reads; convert it "
            f"with transformers, give the tokenizer.json as data.tokenizer (or --tokenizer), or switch the export off"
        )
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{source.file} has ids up to {tokenizer.vocab_size - 1}, the model has {model.vocab_size} rows: it is another "
            f"model's tokenizer; name the one that the token files were made with"
        )
    said = beside(source.file)
    notes = []
    eos = source.eod
    if eos is None:
        eos = _end(tokenizer, source)
    token = tokenizer.token(eos)
    if token is None:
        raise UserError(f"data.eod: {eos} is no token of {source.file}: give the id that ends the documents of the data")
    if (stated := said.named("eos_token")) not in (None, token):
        notes.append(f"{said.file} beside {source.file} says that {stated!r} ends a text; exported is {token!r} (id {eos})")
    if source.stated.get("eos") not in (None, eos):
        notes.append(f"the start's config.json says eos_token_id {source.stated['eos']}; exported is {eos} ({token!r})")

    content = json.loads(tokenizer.content)
    vocabulary = tokenizer.vocabulary
    special = {str(each["content"]) for each in content.get("added_tokens") or [] if each.get("special")}
    names = {key: value for key in _NAMED if (value := said.named(key)) in vocabulary and value is not None} | {
        "eos_token": token
    }
    if said.file is None and source.stated.get("bos", eos) is not None:  # nobody says that no token begins texts
        names.setdefault("bos_token", token)
    names.setdefault("unk_token", (content.get("model") or {}).get("unk_token") or token)
    if "pad_token" not in names and (pad := next((each for each in _PADS if each in special), None)) is not None:
        names["pad_token"] = pad
    if around := tokenizer.added_around():
        notes.append(f"transformers puts {' '.join(around)} around every text, which the token files don't hold")
    settings = {key: value for key, value in said.without_places().items() if key not in _NAMED}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(settings.get(key), list):
            settings[key] = [each for each in settings[key] if _content(each) in vocabulary]
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.max_positions, **names}
    settings["add_prefix_space"] = bool((content.get("pre_tokenizer") or {}).get("add_prefix_space", False))
    files = {"tokenizer.json": _uncut(tokenizer.content, content), "tokenizer_config.json": _json(settings)}
    if source.file.name in TOKENIZER_FILES:
        folder = source.file.parent
        files |= {name: (folder / name).read_bytes() for name in (*_COPIED, *TEMPLATES) if (folder / name).is_file()}
        if (folder / "special_tokens_map.json").is_file():
            files["special_tokens_map.json"] = _json(names)
    ids = {role: vocabulary[names[f"{role}_token"]] if f"{role}_token" in names else None for role in ("bos", "eos", "pad")}
    if ids["bos"] is None:
        ids["bos"] = source.stated.get("bos")
    return ExportedTokenizer(files, ids, notes)


def without_tokenizer(source: TokenizerSource, why: str) -> ExportedTokenizer:
    """No files for the export, a note that says why, and the ids as far as ``source`` states them."""
    eos = source.stated.get("eos") if source.eod is None else source.eod
    ids = {"bos": source.stated.get("bos", eos), "eos": eos, "pad": source.stated.get("pad")}
    notes = [f"no tokenizer is in the export: {why}"]
    if eos is None:
        notes.append("no token is known to end a text, so eos_token_id is null: give data.eod")
    return ExportedTokenizer({}, ids, notes)


def _end(tokenizer: HuggingFaceTokenizer, source: TokenizerSource) -> int:
    """The end that the tokenizer names; where it names none or several, the one in the config.json of the weights."""
    try:
        return tokenizer.eod_id
    except UserError:
        stated = source.stated.get("eos")
        if stated is None or tokenizer.token(stated) is None:
            raise
        return stated


def _uncut(original: bytes, content: dict[str, Any]) -> bytes:
    """tokenizer.json without its truncation and padding, which token files are made without."""
    if content.get("truncation") is None and content.get("padding") is None:
        return original
    return json.dumps(content | {"truncation": None, "padding": None}, ensure_ascii=False, indent=2).encode()


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Write ``files`` into ``folder``. Raises ``OSError``."""
    for name, data in files.items():
        (folder / name).write_bytes(data)


def write_folder(files: Mapping[str, bytes], folder: Path) -> None:
    """Write ``files`` into the new ``folder``, which appears whole or not at all. Raises ``UserError`` as ``refuse_existing``,
    and where it can't be written."""
    refuse_existing(folder)
    with new_folder(folder, lambda _: False) as new:
        write_files(files, new)


def refuse_existing(folder: Path) -> None:
    """Raise ``UserError`` where ``folder`` is there and not empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: exists; choose another folder or remove it")
