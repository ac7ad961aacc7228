"""Folders that appear whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megarewarm.errors import UserError


@contextmanager
def new_folder(folder: Path, may_replace: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder to write in, which takes the place of ``folder`` when the block ends without an error.

    What stands there is replaced where it is empty or ``may_replace`` says so. Raises ``UserError`` for anything else that
    stands there, and when the disk refuses.
    """
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or may_replace(folder))):
        raise UserError(f"{folder}: exists and is not an export of megarewarm: choose another folder or remove it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            yield new
            if folder.exists():
                folder.rename(Path(scratch) / "old")
            new.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error}); make room or correct the permissions") from error
