"""From files and ``section.key=value`` words to a validated configuration, every error on one line with its place."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from megarewarm.config.data import ByScore
from megarewarm.config.paths import expanded
from megarewarm.config.problems import in_words
from megarewarm.config.schema import RunConfig
from megarewarm.config.unknown_keys import foreign_meaning, known_keys, meant
from megarewarm.config.yaml_text import Origins, parse_scalar, read_yaml, write_yaml
from megarewarm.errors import UserError, nearest
from megarewarm.record.layout import CONFIG_FILE, take_format
from megarewarm.untrusted import redacted, secrets_of

_CHOICE = re.compile(r"^[a-z-]+\[|^constrained-|^(str|int|float|bool)$")

Model = TypeVar("Model", bound=BaseModel)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``base``: mappings merge key by key, everything else (lists too) replaces what was there."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _read_with_parents(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], Origins]:
    """A file merged over the files its ``extends`` names (paths are relative to the file itself)."""
    resolved = path.resolve()
    if resolved in seen:
        raise UserError(f"{path}: 'extends' goes round in a circle: {' -> '.join(p.name for p in (*seen, resolved))}")
    mapping, origins = read_yaml(path)
    mapping = take_format(mapping, path)
    base = mapping.get("base")
    if isinstance(base, dict) and "extends" in base:  # an experiment whose base is a run's file
        parents, parent_origins = _parents(base, path, origins.get(("base", "extends"), str(path)), (*seen, resolved))
        mapping = mapping | {"base": merge(parents, base)}
        origins = {("base", *place): where for place, where in parent_origins.items()} | origins
    parents, parent_origins = _parents(mapping, path, origins.get(("extends",), str(path)), (*seen, resolved))
    return merge(parents, mapping), parent_origins | origins


def _parents(mapping: dict[str, Any], path: Path, where: str, seen: tuple[Path, ...]) -> tuple[dict[str, Any], Origins]:
    """What ``mapping`` extends, merged; its key 'extends' is taken out. ``path``: the file of ``mapping``."""
    parents = mapping.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise UserError(f"{where}: 'extends' takes a file name or a list of them")
    merged: dict[str, Any] = {}
    merged_origins: Origins = {}
    for parent in parents:
        parent_path = path.parent / path_text(parent, where)
        if not parent_path.is_file():
            raise UserError(f"{where}: 'extends' names {parent_path.absolute()}, which does not exist")
        parent_mapping, parent_origins = _read_with_parents(parent_path, seen)
        merged = merge(merged, parent_mapping)
        merged_origins |= parent_origins
    return merged, merged_origins


def read_configs(words: Sequence[str]) -> tuple[dict[str, Any], Origins]:
    """Config files and ``section.key=value`` words, merged from left to right; the words apply last.

    Returns the merged mapping, not yet validated, and where each key came from. Raises ``UserError``.
    """
    files = [word for word in words if is_file_word(word)]
    for file in files:
        _check_there(file, words)
    mapping: dict[str, Any] = {}
    origins: Origins = {}
    for file in files:
        file_mapping, file_origins = _read_with_parents(Path(path_text(file, "command line")), ())
        mapping = merge(mapping, file_mapping)
        origins |= file_origins
    for word in words:
        if word not in files:
            apply_override(mapping, origins, word)
    return mapping, origins


def _check_there(file: str, words: Sequence[str]) -> None:
    """Raise ``UserError`` for a word that is taken for a config file and names none, saying what it may be instead."""
    path = Path(path_text(file, "command line"))
    if path.exists():
        return
    at = words.index(file)
    apart = any(word.endswith("=") for word in words[max(at - 1, 0) : at]) or any(w[:1] == "=" for w in words[at + 1 : at + 2])
    if apart or file.rpartition(".")[2] in known_keys(RunConfig, file.split(".")[:-1]):
        raise UserError(
            f"command line: '{file}' is no config file; a key and its value are one word, without spaces, such as "
            f"training.budget=10"
        )
    beside = {entry.stem: entry.name for entry in path.parent.glob("*.y*ml")} if path.parent.is_dir() else {}
    stem = path.stem if path.suffix in (".yml", ".yaml") else path.name
    hint = nearest(stem, beside)  # the end of a name is alike in all of them
    found = f", did you mean '{beside[hint.split(chr(39))[1]]}'?" if hint else ""
    raise UserError(f"{path.absolute()}: no such config file{found}")


def path_text(path: str, where: str) -> str:
    """A path expanded, with ``UserError`` for one that can't be."""
    try:
        return expanded(path)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def is_file_word(word: str) -> bool:
    """Whether a word of the command line names a file, rather than a key and its value. Raises ``UserError``."""
    return "=" not in word or Path(word).is_file()


def apply_override(mapping: dict[str, Any], origins: Origins, word: str) -> None:
    """Set one ``section.key=value`` in ``mapping``; numbers in the key index into lists."""
    key, _, text = word.partition("=")
    path = key.strip().split(".")
    if not all(path):
        raise UserError(f"command line: '{word}' is not of the form section.key=value")
    where = f"command line ({word})"
    value = parse_scalar(text, where)
    place: Any = mapping
    for i, part in enumerate(path):
        last = i == len(path) - 1
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                raise UserError(f"command line: '{word}': {'.'.join(path[:i])} is a list of {len(place)}; use its index")
            if last:
                place[int(part)] = value
            else:
                place = place[int(part)]
        elif isinstance(place, dict):
            if last:
                place[part] = value
            else:
                if place.get(part) is None:
                    place[part] = {}
                    origins[tuple(path[: i + 1])] = where
                place = place[part]
        else:
            raise UserError(f"command line: '{word}': {'.'.join(path[:i])} is a single value and has no keys below it")
    origins[tuple(path)] = where


def _place(path: tuple[str, ...], origins: Origins) -> str:
    """Where ``path`` or the closest key above it was written."""
    if path[:1] == ("context",) and ("context",) not in origins:
        path = ("model", *path[1:])  # a model of positions alone is a context
    for length in range(len(path), -1, -1):
        if path[:length] in origins:
            return origins[path[:length]]
    return "config"


def read_run_config(folder: Path) -> RunConfig:
    """The configuration of the run in ``folder``. Raises ``UserError`` without one."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file, so {folder} is not a run folder; give the folder of a run")
    mapping, origins = read_yaml(path)
    return validate(RunConfig, take_format(mapping, path), origins)


def validate(model: type[Model], mapping: dict[str, Any], origins: Origins) -> Model:
    """``mapping`` as a ``model``. Raises ``UserError``: one line per problem, each with file, line, key and remedy."""
    _refuse_secrets(mapping, origins, (), secrets_of())
    try:
        return model.model_validate(mapping)
    except ValidationError as error:
        raise UserError("\n".join(dict.fromkeys(_lines(model, error, origins)))) from None


def _lines(model: type[BaseModel], error: ValidationError, origins: Origins) -> list[str]:
    """A line for each problem: unknown keys first, and without the missing keys that they were meant to be."""
    unknown, others = [], []
    instead: set[tuple[str, ...]] = set()
    items: list[tuple[tuple[str, ...], dict[str, Any]]] = []
    for problem in error.errors():
        loc = tuple(part for part in problem["loc"] if part != ByScore.__name__)  # a section that may be a word instead
        items.append((tuple(map(str, loc)), {**problem, "loc": loc}))
    for path, item in items:
        if item["type"] == "extra_forbidden":
            section, known = ".".join(path[:-1]), known_keys(model, item["loc"][:-1])
            found = meant(model, path)
            instead |= {tuple(key.split(".")) for key in found}
            likely = " or ".join(_beside(key, section) for key in found)
            hint = f", did you mean {likely}" if found else f"; known here: {', '.join(known)}"
            if found:
                hint += f"{f' ({what})' if (what := foreign_meaning(model, path[-1])) else ''}?"
            if len(path) == 1 and "base" in known:
                hint += "; keys of all runs, and 'extends' with a run's file, belong in 'base'"
            unknown.append(f"{_place(path, origins)}: unknown key '{path[-1]}'{f' in {section}' if section else ''}{hint}")
    wrong: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for path, item in items:
        if item["type"] == "missing" and isinstance(item["loc"][-1], int):
            wrong.setdefault(path[:-1], []).append(item)
        elif item["type"] == "missing" and path not in instead:
            others.append(f"{_place(path, origins)}: '{'.'.join(path)}' is missing and has no default")
        elif item["type"] not in ("extra_forbidden", "missing"):
            # of a key that may be one of several things, pydantic names each of them as a step of the way
            wrong.setdefault(tuple(part for part in path if not _CHOICE.search(part)), []).append(item)
    for path, problems in wrong.items():
        if any(other[: len(path)] == path and other != path for other in wrong):
            continue  # a list with a wrong item is no wrong word
        words = in_words(problems, known_keys(model, path))
        others.append(f"{_place(path, origins)}: {'.'.join(path) + ': ' if path else ''}{words}")
    return unknown + others


def _beside(key: str, section: str) -> str:
    """A dotted key as somebody writes it who is in ``section``."""
    above, _, name = key.rpartition(".")
    return f"'{name}'" if above == section else f"'{key}'" if above else f"'{key}' at the top level"


def _refuse_secrets(value: Any, origins: Origins, path: tuple[str, ...], secrets: Sequence[str]) -> None:
    """Raise ``UserError`` for a token or password: config.yaml and the report would keep it."""
    if isinstance(value, str) and redacted(value, secrets) != value:
        raise UserError(
            f"{_place(path, origins)}: {'.'.join(path)} holds a token or password, which config.yaml would keep; leave it out: "
            f"HF_TOKEN and WANDB_API_KEY are read from the environment, git's and the hub's own from where they keep them"
        )
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        _refuse_secrets(item, origins, (*path, str(key)), secrets)


def dump(config: BaseModel) -> str:
    """The resolved configuration as YAML that loads to the same configuration."""
    mapping = config.model_dump(mode="json", by_alias=True)
    return write_yaml(mapping)
