"""config.yaml of a run folder, which may be somebody else's: plain values of a bounded size, whatever the file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

from megarewarm.errors import UserError
from megarewarm.record.layout import CONFIG_FILE, take_format
from megarewarm.untrusted import one_line

_MOST_VALUES = 500_000  # that aliases may stand for

try:
    from yaml._yaml import CParser

    class _Loader(Composer, CParser, SafeConstructor, Resolver):
        """libyaml's parser, several times as fast, below Python's composer: libyaml's own ends the process in deep nesting."""

        def __init__(self, stream: str) -> None:
            CParser.__init__(self, stream)
            Composer.__init__(self)
            SafeConstructor.__init__(self)
            Resolver.__init__(self)

except ImportError:  # PyYAML was built without libyaml
    _Loader = yaml.SafeLoader  # type: ignore[misc,assignment]


def read_settings(folder: Path) -> dict[str, Any]:
    """The run's resolved configuration without its format; empty where the folder has none. Raises ``UserError``."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        try:
            node = loader.get_single_node()
            if node is not None and _count(node, {}) > _MOST_VALUES:
                raise UserError(f"{path}: its aliases stand for too many values, or for themselves; write it without")
            config = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:  # a date or number that is none, bytes
        raise UserError(f"{path}: not YAML: {one_line(str(error))}") from None
    except RecursionError:
        raise UserError(f"{path}: not YAML: nested too deeply") from None
    if not isinstance(config, dict):
        return {}
    return {str(key): value for key, value in take_format(config, path).items()}


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values the node stands for; more than can be where an alias is inside of what it names."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES + 1  # for as long as it is being counted
        children = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_count(child, known) for child in children)
    return known[id(node)]
