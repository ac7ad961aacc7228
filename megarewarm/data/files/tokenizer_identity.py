"""Whether two tokenizers give the same ids: the relevant parts of a tokenizer.json, and what manifests record of them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict

# Parts of a tokenizer.json that have no influence on the ids of a text (special tokens are never added to it).
_WITHOUT_EFFECT = ("version", "truncation", "padding", "post_processor", "decoder")


class TokenizerIdentity(BaseModel):
    """The parts of a tokenizer that determine its ids.

    ``fingerprint``: of everything (sha256, hex). ``function``: of everything but the added tokens, independent of the file's
    form; ``added``: those, each with its id and the flags that matter. None in manifests of earlier versions.
    """

    model_config = ConfigDict(frozen=True)

    fingerprint: str
    file: str | None = None
    function: str | None = None
    added: dict[str, str] | None = None

    def agrees_with(self, other: TokenizerIdentity) -> bool:
        """Whether both give the same ids, but for texts with an added token that only one of them has."""
        if self.fingerprint == other.fingerprint:
            return True
        if self.function is None or self.function != other.function or self.added is None or other.added is None:
            return False
        both = self.added | other.added
        if any(both[token] != how for token, how in self.added.items()):
            return False
        ids = [how.split()[0] for how in both.values()]
        return len(set(ids)) == len(ids)


def fingerprint(content: dict[str, Any]) -> str:
    """sha256 (hex) of a tokenizer.json's parts that decide which ids a text gets. Manifests and caches hold it."""
    return _hash(_without_defaults(_kept(content)))


def function_and_added(content: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """``TokenizerIdentity.function`` and ``added`` of a tokenizer.json's ``content``."""
    kept = _kept(content)
    tokens = kept.pop("added_tokens", None) or []
    if "merges" in kept.get("model", {}):
        kept["model"] = {"type": "BPE"} | kept["model"]
    # which of an added token and a normaliser comes first matters only where there are both kinds, or a normaliser
    normal = {bool(token.get("normalized", True)) for token in tokens}
    flags = ["lstrip", "rstrip", "single_word"] + (["normalized"] if kept.get("normalizer") or len(normal) > 1 else [])
    added = {str(t["content"]): " ".join([str(t["id"]), *(flag for flag in flags if t.get(flag))]) for t in tokens}
    return _hash(_without_defaults(_plain(kept))), added


def _kept(content: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in content.items() if key not in _WITHOUT_EFFECT}
    model = kept.get("model")
    if isinstance(model, dict) and model.get("merges") and isinstance(model["merges"][0], str):
        # older versions of the library write pairs as "a b"
        kept["model"] = model | {"merges": [pair.split(" ") for pair in model["merges"]]}
    return kept


def _plain(value: Any) -> Any:
    """Normalisers and pre-tokenizers in one form: sequences of one as that one, without what moves offsets only."""
    if not isinstance(value, dict):
        return value
    if value.get("type") == "Sequence":
        parts = [_plain(part) for key in ("normalizers", "pretokenizers") for part in value.get(key) or ()]
        return None if not parts else parts[0] if len(parts) == 1 else {"type": "Sequence", "parts": parts}
    if value.get("type") == "ByteLevel":
        return {key: item for key, item in value.items() if key != "trim_offsets" and not (key == "use_regex" and item)}
    return value | {key: _plain(value[key]) for key in ("normalizer", "pre_tokenizer") if key in value}


def _without_defaults(value: Any) -> Any:
    """``value`` without the keys that are null, false or empty: newer versions of the library write more of them."""
    if isinstance(value, dict):
        kept = {key: _without_defaults(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if not (item is None or item is False or item in ("", [], {}))}
    if isinstance(value, list):
        return [_without_defaults(item) for item in value]
    return value


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
