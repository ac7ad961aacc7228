"""YAML as its writers mean it: numbers such as ``1e-08`` are numbers, a key given twice is an error, and every value
remembers the line it came from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from megarewarm.errors import UserError

Origins = dict[tuple[str, ...], str]
"""Where each key of a merged configuration was set: key path -> ``file:line`` or ``command line``."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's floats: 1.1 reads ``1e-08`` and ``3e8`` as strings."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _value(node: yaml.Node, loader: _Loader, file: str, path: tuple[str, ...], origins: Origins) -> Any:
    where = f"{file}:{node.start_mark.line + 1}"
    origins[path] = where
    if isinstance(node, yaml.MappingNode):
        loader.flatten_mapping(node)
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            where = f"{file}:{key_node.start_mark.line + 1}"
            if not isinstance(key, str):
                raise UserError(f"{where}: the key {key!r} is not text; put it in quotes")
            if key in result:
                raise UserError(f"{where}: '{'.'.join((*path, key))}' is given twice; remove one")
            result[key] = _value(value_node, loader, file, (*path, key), origins)
            origins[(*path, key)] = where
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, loader, file, (*path, str(i)), origins) for i, item in enumerate(node.value)]
    return loader.construct_object(node, deep=True)


def parse_yaml(text: str, file: str) -> tuple[dict[str, Any], Origins]:
    """``text`` as a dict, and the line of every key. ``file`` is the name used in messages.

    Raises ``UserError`` for text that is not YAML, is not a mapping, or gives a key twice.
    """
    loader = _Loader(text)
    origins: Origins = {}
    try:
        node = loader.get_single_node()
        if node is None:
            return {}, origins
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{file}: expected 'key: value' lines at the top level, found a {node.tag.rpartition(':')[2]}")
        return _value(node, loader, file, (), origins), origins
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{file}{line}: not valid YAML: {problem}") from error
    finally:
        loader.dispose()


def read_yaml(path: Path) -> tuple[dict[str, Any], Origins]:
    """The mapping in a YAML file and the line of every key. Raises ``UserError`` naming the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read as text: {error}") from error
    mapping, origins = parse_yaml(text, str(path))
    if not mapping:
        raise UserError(f"{path}: the file is empty; expected the sections of a run (docs/config.md)")
    return mapping, origins


def parse_scalar(text: str, where: str) -> Any:
    """The value on the right of ``section.key=value``, read as YAML would (``null``, ``1e-4``, ``[1, 2]`` ...)."""
    return parse_yaml(f"value: {text}", where)[0]["value"]
