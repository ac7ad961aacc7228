"""Paths as people write them: ``~`` is the home folder and ``$NAME`` the environment's, in files, words and arguments alike."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from megarewarm.untrusted import is_secret

_VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|([A-Za-z_][A-Za-z0-9_]*))")


def expanded(path: str, keep: tuple[str, ...] = ()) -> str:
    """``path`` with ``~``, ``~user``, ``$NAME`` and ``${NAME}`` replaced, but for the names to ``keep``.

    Nothing else changes, so what is expanded once stays as it is. Raises ``ValueError`` naming a variable that is not set, or
    that by its name holds a secret, and for a home that isn't known.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1] if found[1] is not None else found[2]
        if name in keep:
            return found[0]
        if is_secret(name):
            raise ValueError(f"'{path}' names the environment's variable '{name}', which holds a secret; write the path out")
        if name not in os.environ:
            raise ValueError(f"'{path}' names the environment's variable '{name}', which is not set; set it, or write it out")
        return os.environ[name]

    result = os.path.expanduser(_VARIABLE.sub(value, path))
    if result.startswith("~"):
        raise ValueError(f"'{path}' begins in a home folder that isn't known; write the path out (./~ for a folder called '~')")
    return result


def merges_beside(vocabulary: Path) -> Path | None:
    """Where the merges of GPT-2's vocab.json lie: merges.txt, gpt2-merges.txt beside gpt2-vocab.json; None for other names."""
    name = vocabulary.name
    return vocabulary.with_name(f"{name.removesuffix('vocab.json')}merges.txt") if name.endswith("vocab.json") else None


class PathMark:
    """In the schema: this text is a path."""


def _template(path: str) -> str:
    return expanded(path, ("folder", "runs"))


PathText = Annotated[str, AfterValidator(expanded), PathMark()]
"""A path, expanded."""
PathTemplate = Annotated[str, AfterValidator(_template), PathMark()]
"""A path of an experiment, expanded but for ``${folder}`` and ``${runs}``."""
