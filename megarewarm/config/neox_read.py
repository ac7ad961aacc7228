"""Reading GPT-NeoX's YAML: which dialect a file is in, several files as one flat mapping, every key and type checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarewarm.config.neox_keys import HONOURED, NOT_APPLICABLE, ONLY, is_known, refusal_of_family
from megarewarm.config.schema import RunConfig
from megarewarm.config.yaml_text import read_yaml
from megarewarm.errors import UserError, nearest

# Words of our own top level that GPT-NeoX has not; 'optimizer' and 'checkpoint' are in both.
_OURS = {*RunConfig.model_fields, "extends", "experiment", "base", "runs"} - {"optimizer", "checkpoint"}


@dataclass(frozen=True)
class NeoxFile:
    """The merged keys of GPT-NeoX files, with underscores; where each was written; and what has no effect here, with why."""

    values: dict[str, Any]
    places: dict[str, str]
    not_applicable: dict[str, str]
    name: str

    def place(self, key: str) -> str:
        """``file:line: key`` for messages."""
        return f"{self.places.get(key, self.name)}: {key}"


def normalised(key: str) -> str:
    """GPT-NeoX's keys may be written with dashes."""
    return key.replace("-", "_")


def is_neox(mapping: dict[str, Any], file: str) -> bool:
    """Whether a file's top level is in GPT-NeoX's dialect. Raises ``UserError`` for keys of both in one file."""
    ours = [key for key in mapping if key in _OURS]
    theirs = [k for k in mapping if k not in {*_OURS, "optimizer", "checkpoint"} and is_known(normalised(k))]
    if ours and theirs:
        raise UserError(
            f"{file}: '{ours[0]}' is a key of megarewarm and '{theirs[0]}' one of GPT-NeoX; keep to one of the two in a file"
        )
    return bool(theirs)


def neox_files(words: Sequence[str]) -> list[Path]:
    """The files among the command line's words if they are GPT-NeoX's, else nothing.

    Raises ``UserError`` where some are and others are not.
    """
    files = [Path(word) for word in words if "=" not in word or Path(word).is_file()]
    if not files or not all(file.is_file() for file in files):
        return []
    dialects = [is_neox(read_yaml(file)[0], str(file)) for file in files]
    if any(dialects) and not all(dialects):
        one, other = files[dialects.index(True)], files[dialects.index(False)]
        raise UserError(f"{other}: a config of megarewarm beside {one}, one of GPT-NeoX; give files of one kind")
    return files if all(dialects) else []


def read_neox(files: Sequence[Path]) -> NeoxFile:
    """All keys of ``files``, checked against GPT-NeoX's own rules and what is possible here.

    Raises ``UserError`` naming file, line and key: a key in two files, two files of one name, an unknown key, a wrong type, a
    value that is not possible here.
    """
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for i, file in enumerate(files):
        if file.name in (other.name for other in files[:i]):
            raise UserError(f"{file}: two files are called {file.name}; GPT-NeoX merges by name, so rename one")
        mapping, origins = read_yaml(file)
        for written, value in mapping.items():
            key, place = normalised(written), origins[(written,)]
            if key in values:
                raise UserError(f"{place}: '{key}' is given in {places[key]} as well; GPT-NeoX merges nothing, remove one")
            values[key], places[key] = value, place
    result = NeoxFile(values, places, {}, str(files[-1]))
    for key, value in values.items():
        _check(result, key, value)
    if "pos_emb" not in values:
        raise UserError(f"{result.name}: 'pos_emb' is missing: {ONLY['pos_emb'][1]} (pos_emb: rotary)")
    return result


def _check(file: NeoxFile, key: str, value: Any) -> None:
    place = file.place(key)
    if key in HONOURED:
        types, _ = HONOURED[key]
        wrong_bool = isinstance(value, bool) and bool not in types
        if value is not None and (wrong_bool or not isinstance(value, types)):
            wanted = " or ".join(kind.__name__ for kind in types)
            raise UserError(f"{place}: {value!r} is of type {type(value).__name__}, expected {wanted}")
    elif key in ONLY:
        allowed, reason = ONLY[key]
        if not _is_among(value, allowed):
            raise UserError(f"{place}: {value!r} can't be honoured: {reason}")
    elif key in NOT_APPLICABLE:
        file.not_applicable[key] = NOT_APPLICABLE[key]
    elif (reason := refusal_of_family(key) or "") and value not in (None, False, 0):
        raise UserError(f"{place}: {value!r} can't be honoured: {reason}")
    elif not reason:
        known = [*HONOURED, *NOT_APPLICABLE, *ONLY]
        raise UserError(f"{place}: not a key of GPT-NeoX{nearest(key, known)}")


def _is_among(value: Any, allowed: tuple[Any, ...]) -> bool:
    if isinstance(value, dict):  # a block that is switched off may say anything else
        return not value.get("enabled", True) and any(isinstance(item, dict) for item in allowed)
    return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in allowed)
