"""What of a folder of prepared data is complete, so that it is not made again: FOLDER/prepared.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megarewarm.errors import UserError
from megarewarm.files import PART, write_whole


class PreparedSteps:
    """FOLDER/prepared.json: which steps are complete, with which parameters, and which files they left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "prepared.json"
        self.steps: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            try:
                self.steps = json.loads(self._path.read_bytes())["steps"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self._path} is damaged: remove it, and the data will be made again") from error

    def stands(self, step: str, key: str) -> bool:
        facts = self.steps.get(step)
        if facts is None or facts["key"] != key:
            return False
        files = [(self.folder / name, size) for name, size in facts["files"].items()]
        return all(path.is_file() and path.stat().st_size == size for path, size in files)

    def forget(self, step: str) -> None:
        """Call it before a step's files are changed."""
        for part in self.folder.glob(f"{step}*{PART}"):  # of a run that was killed
            part.unlink()
        if self.steps.pop(step, None) is not None:
            self._write()

    def finish(self, step: str, key: str, files: Sequence[Path], facts: Mapping[str, Any]) -> None:
        sizes = {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in files}
        self.steps[step] = {"key": key, "files": sizes, **facts}
        self._write()

    def _write(self) -> None:
        write_whole(self._path, (json.dumps({"steps": self.steps}, indent=2) + "\n").encode())
