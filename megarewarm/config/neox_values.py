"""The values of a GPT-NeoX configuration as GPT-NeoX takes them: with its defaults, paths expanded, errors at their lines."""

from __future__ import annotations

from typing import Any

from megarewarm.config import neox_blocks, neox_keys
from megarewarm.config.load import path_text
from megarewarm.config.neox_read import NeoxFile
from megarewarm.errors import UserError


class NeoxValues:
    """``notes``: what a reader of the file may not expect; ``idle``: keys without effect beside others of the file, with why;
    ``asked``: the key that was looked up last."""

    def __init__(self, file: NeoxFile) -> None:
        self.file = file
        self.notes: list[str] = []
        self.idle: dict[str, str] = {}
        self.asked = ""

    def get(self, key: str) -> Any:
        """The value of a key, dotted inside of a block, or GPT-NeoX's default. null is false where a switch is expected."""
        self.asked = key
        known = (neox_blocks if "." in key else neox_keys).HONOURED[key]
        value: Any = self.file.values
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return known.default
            value = value[part]
        if value is not None and key in neox_keys.PATHS:
            where = self.file.place(key)
            if not isinstance(value, list):
                return path_text(value, where)
            if other := [path for path in value if not isinstance(path, str)]:
                raise UserError(f"{where}: {other[0]!r} is no path; expected a list of paths")
            return [path_text(path, where) for path in value]
        return False if value is None and bool in known.types else value

    def require(self, key: str) -> Any:
        if self.file.values.get(key) is None:
            raise UserError(f"{self.file.name}: '{key}' is missing and has no default")
        return self.file.values[key]

    def error(self, key: str, what: str) -> UserError:
        return UserError(f"{self.file.place(key)}: {what}")

    def choice(self, key: str, choices: dict[str, str]) -> str:
        value = self.get(key)
        if value not in choices:
            raise self.error(key, f"{value!r} can't be honoured, only {', '.join(map(repr, choices))}")
        return choices[value]
