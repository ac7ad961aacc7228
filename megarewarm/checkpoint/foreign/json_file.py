"""JSON files of other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megarewarm.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ``UserError`` for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.absolute()}: no such file; expected a Hugging Face model folder") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def first_line(error: BaseException) -> str:
    """A one-line version of another library's error message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
