"""Folders that appear whole or not at all."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megarewarm.errors import UserError
from megarewarm.files import publish_folder

log = logging.getLogger(__name__)


@contextmanager
def new_folder(folder: Path, may_replace: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder to write in, which replaces ``folder`` (or its link target) when the block ends without an error.

    Empty folders are replaced, and others if ``may_replace`` allows it. A folder that can't be renamed, such as a mount
    point, stays, and its content is exchanged; only there a kill can leave a partial folder. Raises ``UserError`` for
    anything else at the place, and when the disk refuses.
    """
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or may_replace(folder))):
        raise UserError(f"{folder}: exists and is not an export of megarewarm: choose another folder or remove it")
    place = folder.resolve()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        inside = place.is_dir() and (os.path.ismount(place) or not os.access(place.parent, os.W_OK))
        # on NFS a file of the old folder that somebody has open can't be removed yet
        with tempfile.TemporaryDirectory(
            prefix=f".{place.name[:40]}-", dir=place if inside else place.parent, ignore_cleanup_errors=True
        ) as name:
            scratch = Path(name)
            new = scratch / "new"
            new.mkdir()
            yield new
            if inside or not _renamed(new, place, scratch / "old"):
                _exchange(new, place, scratch)
        if scratch.exists():
            log.warning("%s: not removed (a file in it is still open, on this host or another): remove it later", scratch)
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error}); make room or correct the permissions") from error


def _renamed(new: Path, place: Path, old: Path) -> bool:
    """Move the present content of the place to ``old`` and ``new`` into the place; False, without a change, if the folders
    can't be renamed."""
    try:
        publish_folder(new, place, lambda: place.exists() and place.rename(old))
    except OSError as error:
        if old.exists():
            old.rename(place)
        if error.errno not in (errno.EXDEV, errno.EBUSY):
            raise
        return False
    return True


def _exchange(new: Path, place: Path, scratch: Path) -> None:
    """Put the content of ``new`` into the folder ``place`` instead of what is in it."""
    place.mkdir(exist_ok=True)
    for entry in place.iterdir():
        if entry == scratch:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    for entry in new.iterdir():
        shutil.move(entry, place / entry.name)
