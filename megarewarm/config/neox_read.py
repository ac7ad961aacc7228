"""Reading GPT-NeoX's YAML: which dialect a file is in, several files as one flat mapping, every key and type checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megarewarm.config import neox_blocks, neox_keys
from megarewarm.config.load import is_file_word, path_text
from megarewarm.config.neox_keys import is_among, is_known, is_off, refusal
from megarewarm.config.schema import RunConfig
from megarewarm.config.yaml_text import read_yaml
from megarewarm.errors import UserError, nearest

# Words of our own top level that GPT-NeoX has not; 'optimizer' and 'checkpoint' are in both.
_OURS = {*RunConfig.model_fields, "extends", "experiment", "base", "runs"} - {"optimizer", "checkpoint"}


@dataclass(frozen=True)
class NeoxFile:
    """The merged keys of GPT-NeoX files, with underscores; where each was written; and what has no effect here, with why.

    ``places``, ``not_applicable`` and ``honoured`` (key -> what it is here) hold the keys inside of blocks too, under dotted
    names such as ``fp16.enabled``.
    """

    values: dict[str, Any]
    places: dict[str, str]
    not_applicable: dict[str, str]
    name: str
    honoured: dict[str, str] = field(default_factory=dict)

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
    files = [Path(path_text(word, "command line")) for word in words if is_file_word(word)]
    if not files or not all(file.is_file() for file in files):
        return []
    dialects = [is_neox(read_yaml(file)[0], str(file)) for file in files]
    if any(dialects) and not all(dialects):
        one, other = files[dialects.index(True)], files[dialects.index(False)]
        raise UserError(f"{other}: a config of megarewarm beside {one}, one of GPT-NeoX; give files of one kind")
    return files if all(dialects) else []


def read_neox(files: Sequence[Path]) -> NeoxFile:
    """All keys of ``files``, at every depth, checked against GPT-NeoX's own rules and what is possible here.

    Raises ``UserError`` naming file, line and key: a key in two files, two files of one name, an unknown key, a wrong type, a
    value that is not possible here.
    """
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for i, file in enumerate(files):
        if file.name in (other.name for other in files[:i]):
            raise UserError(f"{file}: two files are called {file.name}; GPT-NeoX merges by name, so rename one")
        mapping, origins = read_yaml(file, switches=True)  # GPT-NeoX reads by PyYAML
        for written, value in mapping.items():
            key, place = normalised(written), origins[(written,)]
            if not is_known(key):
                raise UserError(f"{place}: {written}: not a key of GPT-NeoX{_nearest(written)}")
            if key in values:
                raise UserError(f"{place}: '{key}' is given in {places[key]} as well; GPT-NeoX merges nothing, remove one")
            values[key] = value
            places |= {".".join((key, *path[1:])): where for path, where in origins.items() if path[:1] == (written,)}
    result = NeoxFile(values, places, {}, str(files[-1]))
    check_keys(result)
    if "pos_emb" not in values:
        raise UserError(f"{result.name}: 'pos_emb' is missing: {neox_keys.ONLY['pos_emb'][1]} (pos_emb: rotary)")
    return result


def _nearest(written: str) -> str:
    """The known key that is meant, in the spelling of who wrote it."""
    known = [*neox_keys.HONOURED, *neox_keys.NOT_APPLICABLE, *neox_keys.ONLY, *neox_keys.OVERWRITTEN]
    return nearest(written, [key.replace("_", "-") for key in known] if "-" in written else known)


def check_keys(file: NeoxFile) -> None:
    """Decide the fate of every key of ``file`` and note it there. Raises ``UserError`` naming file, line and key."""
    for key, value in file.values.items():
        _check(file, key, value)


def _check(file: NeoxFile, path: str, value: Any, *, off: bool = False) -> None:
    """``path``: a key, or dotted one inside of a block. ``off``: the block is switched off, so what it says has no effect."""
    key = _in_table(path)
    place = file.place(path)
    tables = neox_blocks if "." in key else neox_keys
    if key in tables.ONLY and key in neox_blocks.BLOCKS:
        _check_inside(file, path, value, off=True)  # a misspelt key is the cause, where there is one
    if key in tables.HONOURED:
        _check_type(place, value, tables.HONOURED[key])
        if tables is neox_keys and (why := refusal(key, value, file.values)) is not None:
            raise UserError(f"{place}: {_shown(value)} can't be honoured: {why}")
        file.honoured[path] = tables.HONOURED[key].meaning
    elif key in tables.ONLY:
        allowed, reason = tables.ONLY[key]
        why = refusal(key, value, file.values) if tables is neox_keys else None if is_among(value, allowed) else reason
        if why is not None and not off:
            raise UserError(f"{place}: {_shown(value)} can't be honoured: {why}")
    elif key in tables.NOT_APPLICABLE:
        if path.count(".") == 0 or path.rpartition(".")[0] not in file.not_applicable:
            file.not_applicable[path] = tables.NOT_APPLICABLE[key]
    elif key in neox_keys.OVERWRITTEN:
        file.not_applicable[path] = f"GPT-NeoX overwrites it by {neox_keys.OVERWRITTEN[key][1]}"
    else:
        block = key.rpartition(".")[0]
        known = [name.rpartition(".")[2] for name in _keys_of(block)]
        hint = nearest(key.rpartition(".")[2], known) or f"; known there: {', '.join(known)}"
        raise UserError(f"{place}: not a key of GPT-NeoX's block '{path.rpartition('.')[0]}'{hint}")
    if key not in tables.ONLY:
        _check_inside(file, path, value, off=off)


def _check_inside(file: NeoxFile, path: str, value: Any, *, off: bool) -> None:
    """The keys of a block; of anything else there is nothing to check."""
    if path.removeprefix("deepspeed_extra_args.") not in neox_blocks.BLOCKS or value is None:
        return
    if not isinstance(value, dict):
        raise UserError(
            f"{file.place(path)}: {_shown(value)} is of type {type(value).__name__}, expected a mapping such as fp16's"
        )
    for name, item in value.items():
        _check(file, f"{path}.{name}", item, off=off or is_off(value))


def _in_table(path: str) -> str:
    """The name under which the tables have ``path``: blocks inside of deepspeed_extra_args are those of the top level."""
    rest = path.removeprefix("deepspeed_extra_args.")
    return rest if rest != path and "." in rest else path


def _keys_of(block: str) -> list[str]:
    names = (*neox_blocks.HONOURED, *neox_blocks.NOT_APPLICABLE, *neox_blocks.ONLY)
    return [name for name in names if name.rpartition(".")[0] == block]


def _check_type(place: str, value: Any, key: neox_keys.Honoured) -> None:
    """Raise ``UserError`` for a value that GPT-NeoX does not take there; null is its own default, or false, or nothing."""
    if value is None and key.default is not None and bool not in key.types:
        raise UserError(f"{place}: null says nothing; leave it out for GPT-NeoX's default, {key.default!r}")
    wrong_bool = isinstance(value, bool) and bool not in key.types
    if value is not None and (wrong_bool or not isinstance(value, key.types)):
        wanted = " or ".join(kind.__name__ for kind in key.types)
        raise UserError(f"{place}: {_shown(value)} is of type {type(value).__name__}, expected {wanted}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
