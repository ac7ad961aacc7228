"""Files such as ``latest``, which name a folder beside them."""

from __future__ import annotations

from pathlib import Path

from megarewarm.errors import UserError
from megarewarm.untrusted import is_name


def name_in(pointer: Path) -> str:
    """The name in the file. Raises ``UserError`` if it can't be the name of something beside that file."""
    try:
        with open(pointer, encoding="utf-8") as file:
            name = file.read(1024).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{pointer}: can't be read as text ({error}); copy it again") from error
    if not is_name(name):
        raise UserError(f"{pointer}: holds {name[:80]!r}, which names no folder beside it; copy it again, or name the folder")
    return name
