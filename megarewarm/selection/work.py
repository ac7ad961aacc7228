"""The work folder of a selection while one process has it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from megarewarm.errors import UserError
from megarewarm.file_lock import FileLock
from megarewarm.selection.desk import Desk, ShowProgress
from megarewarm.selection.opening import identity
from megarewarm.selection.step import Corpus


@contextlib.contextmanager
def working(folder: Path, corpus: Corpus, show: ShowProgress) -> Iterator[Desk]:
    """A desk in ``folder``, which is made if it is not there and removed if nothing was kept in it. Raises ``UserError`` while
    another process works there."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / "lock")
    except BlockingIOError as error:
        raise UserError(f"{folder}: another process is making this selection ({error.strerror}); wait for it") from error
    with lock:
        try:
            yield Desk(folder, identity(corpus), show)
        finally:
            if is_new and folder.is_dir() and [path.name for path in folder.iterdir()] == ["lock"]:
                shutil.rmtree(folder)
