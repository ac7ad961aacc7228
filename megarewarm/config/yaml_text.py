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
    """PyYAML's safe loader with scalars as people mean them (and mostly YAML 1.2): ``1e-08`` is a number; ``0100``, ``1:30``,
    ``2026-11-28``, ``yes`` and ``=`` are text, of which YAML 1.1 makes 64, 90, a date, true and an error.

    ``left``: how many more values the text may stand for: aliases of aliases make gigabytes out of a few lines.
    """

    left = _FEW

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """As PyYAML's, with an end."""
        super().flatten_mapping(node)
        if len(node.value) > _FEW:
            raise yaml.YAMLError("its aliases stand for too many values")


_TAG = "tag:yaml.org,2002:"
_RESOLVERS = {
    "bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
_DROPPED = {f"{_TAG}{kind}" for kind in (*_RESOLVERS, "timestamp", "value")}


def _resolve_as_meant(kind: Any) -> None:
    """Give a loader or dumper the rules above, so that what one writes the other reads as the same."""
    kind.yaml_implicit_resolvers = {
        first: [rule for rule in rules if rule[0] not in _DROPPED]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for name, (pattern, first) in _RESOLVERS.items():
        kind.add_implicit_resolver(f"{_TAG}{name}", re.compile(f"^(?:{pattern})$"), list(first))


_resolve_as_meant(_Loader)


class _SwitchLoader(_Loader):
    """Also ``yes``, ``no``, ``on`` and ``off`` are true and false, as PyYAML has it: for files that are written for it."""


_SwitchLoader.add_implicit_resolver(
    f"{_TAG}bool", re.compile("^(?:yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF)$"), list("yYnNoO")
)


# ten times as fast where PyYAML was built with libyaml: a blend may have thousands of sources
class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Quotes what `_Loader` or YAML 1.1 would read as something else than text."""


for _name, (_pattern, _first) in _RESOLVERS.items():
    _Dumper.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))


def write_yaml(mapping: dict[str, Any]) -> str:
    """``mapping`` as YAML that `parse_yaml`, and any reader of YAML 1.1, reads as the same. Raises ``UserError`` for text
    that is no Unicode, such as a command line's in a locale that can't hold it."""
    try:
        return str(yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110))
    except UnicodeEncodeError as error:
        shown = error.object.encode("ascii", "backslashreplace").decode()
        raise UserError(f"'{shown}' is no Unicode text: use a UTF-8 locale (LC_ALL=C.UTF-8), or other names") from error


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


def parse_yaml(text: str, file: str, *, switches: bool = False) -> tuple[dict[str, Any], Origins]:
    """``text`` as a dict, and the line of every key. ``file`` is the name used in messages; with ``switches`` yes, no, on and
    off are true and false.

    Raises ``UserError`` for text that is not YAML, is not a mapping, or gives a key twice.
    """
    origins: Origins = {}
    loader: _Loader | None = None
    try:
        loader = (_SwitchLoader if switches else _Loader)(text)
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
        if "'\\t' that cannot start" in str(problem):
            problem = "a tab where PyYAML takes spaces only, also before a comment; write spaces"
        raise UserError(f"{file}{line}: not valid YAML: {' '.join(str(problem).split())}") from error
    except RecursionError as error:
        raise UserError(f"{file}: not valid YAML: nested too deeply") from error
    except ValueError as error:  # of PyYAML's scanner: an escape beyond the last character, a version that is no number
        raise UserError(f"{file}: not valid YAML: {' '.join(str(error).split())[:200]}") from error
    finally:
        if loader is not None:
            loader.dispose()


def read_yaml(path: Path, *, switches: bool = False) -> tuple[dict[str, Any], Origins]:
    """The mapping in a YAML file and the line of every key, as of `parse_yaml`. Raises ``UserError`` naming the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path.absolute()}: no such config file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, expected a config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read as text: {error}") from error
    mapping, origins = parse_yaml(text, str(path), switches=switches)
    if not mapping:
        raise UserError(f"{path}: the file is empty; expected the sections of a run (docs/config.md)")
    return mapping, origins


def parse_scalar(text: str, where: str) -> Any:
    """The value on the right of ``section.key=value``, read as YAML would (``null``, ``1e-4``, ``[1, 2]`` ...)."""
    read = parse_yaml(f"value: {text}", where)[0]
    if list(read) != ["value"]:
        raise UserError(f"{where}: expected one value")
    return read["value"]
