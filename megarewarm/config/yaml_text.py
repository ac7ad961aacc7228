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


_DEEPEST = 64  # levels of nesting; a mapping that is an alias for itself has no end
_FEW = 50_000  # values that any text may stand for; without aliases there are never more than it has characters
_PLAIN = (str, bool, int, float, type(None))


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's floats: 1.1 reads ``1e-08`` and ``3e8`` as strings.

    ``left``: how many more values the text may stand for: aliases of aliases make gigabytes out of a few lines.
    """

    left = _FEW

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """As PyYAML's, with an end."""
        super().flatten_mapping(node)
        if len(node.value) > _FEW:
            raise yaml.YAMLError("its aliases stand for too many values")


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _value(node: yaml.Node, loader: _Loader, file: str, path: tuple[str, ...], origins: Origins) -> Any:
    where = f"{file}:{node.start_mark.line + 1}"
    origins[path] = where
    loader.left -= 1
    if loader.left < 0 or len(path) > _DEEPEST:
        problem = "its aliases stand for too many values" if loader.left < 0 else f"nested more than {_DEEPEST} levels deep"
        raise UserError(f"{where}: not valid YAML: {problem}")
    if isinstance(node, yaml.MappingNode):
        _check_tag(node, "map", where)
        loader.flatten_mapping(node)
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            where = f"{file}:{key_node.start_mark.line + 1}"
            key = _scalar(key_node, loader, where) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                raise UserError(f"{where}: the key {_shown(key_node)} is not text; put it in quotes")
            if not key.isprintable():
                raise UserError(f"{where}: the key {_shown(key_node)} holds signs that can't be seen; write it without")
            if key in result:
                raise UserError(f"{where}: '{'.'.join((*path, key))}' is given twice; remove one")
            result[key] = _value(value_node, loader, file, (*path, key), origins)
            origins[(*path, key)] = where
        return result
    if isinstance(node, yaml.SequenceNode):
        _check_tag(node, "seq", where)
        return [_value(item, loader, file, (*path, str(i)), origins) for i, item in enumerate(node.value)]
    return _scalar(node, loader, where)


def _check_tag(node: yaml.Node, kind: str, where: str) -> None:
    if node.tag != f"tag:yaml.org,2002:{kind}":
        raise UserError(f"{where}: not valid YAML: the tag {node.tag[:80]!r} has no meaning here; remove it")


def _scalar(node: yaml.Node, loader: _Loader, where: str) -> Any:
    try:
        value = loader.construct_object(node, deep=True)
    except yaml.YAMLError:
        raise
    except Exception as error:  # PyYAML takes apart what looks like a date or a number, and not all of it is one
        raise UserError(f"{where}: {_shown(node)} can't be read ({type(error).__name__}); put it in quotes") from error
    if not isinstance(value, _PLAIN):
        raise UserError(f"{where}: {_shown(node)} is a {type(value).__name__}, which no key takes; put it in quotes")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"{where}: {_shown(node)} is too large a number")
    return value


def _shown(node: yaml.Node) -> str:
    return repr(node.value[:80]) if isinstance(node.value, str) else f"of kind {node.tag.rpartition(':')[2][:80]!r}"


def parse_yaml(text: str, file: str) -> tuple[dict[str, Any], Origins]:
    """``text`` as a dict, and the line of every key. ``file`` is the name used in messages.

    Raises ``UserError`` for text that is not YAML, is not a mapping, or gives a key twice.
    """
    origins: Origins = {}
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        loader.left = max(_FEW, len(text))
        node = loader.get_single_node()
        if node is None:
            return {}, origins
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{file}: expected 'key: value' lines at the top level, found a {node.tag.rpartition(':')[2][:80]}")
        return _value(node, loader, file, (), origins), origins
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{file}{line}: not valid YAML: {' '.join(str(problem).split())}") from error
    except RecursionError as error:
        raise UserError(f"{file}: not valid YAML: nested too deeply") from error
    except ValueError as error:  # of PyYAML's scanner: an escape beyond the last character, a version that is no number
        raise UserError(f"{file}: not valid YAML: {' '.join(str(error).split())[:200]}") from error
    finally:
        if loader is not None:
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
    read = parse_yaml(f"value: {text}", where)[0]
    if list(read) != ["value"]:
        raise UserError(f"{where}: expected one value")
    return read["value"]
