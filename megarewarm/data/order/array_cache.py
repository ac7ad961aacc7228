"""Arrays that take long to make, kept on the disk and mapped: made once for all ranks of a machine and for later starts.

An entry is a folder named by the hash of everything its arrays depend on, so it never goes stale. It lies in MEGAREWARM_CACHE,
else XDG_CACHE_HOME or ~/.cache, never beside the data; MEGAREWARM_CACHE set to nothing turns the cache off.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megarewarm.file_lock import FileLock
from megarewarm.files import PART, publish_folder
from megarewarm.untrusted import is_name

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]

OWN_REPLAY = "own_replay"
"""A folder of the cache that is no entry: rewarm/own_replay.py."""

KEPT = 20  # entries; of more, the least recently used ones go


def cached(key: Mapping[str, Any], make: Callable[[], Arrays]) -> Arrays:
    """``make()``, or the result of an earlier call with an equal ``key`` (JSON values), read-only and mapped from the disk.

    Of several processes that ask at once, one makes the arrays and the others wait for it. If the cache can't be used, it
    warns once and the arrays are made in memory.
    """
    name = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()
    made: Arrays | None = None
    folder: Path | str | None = "~/.cache"
    try:
        folder = cache_folder()
        if folder is None:
            return make()
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name}.lock", wait=True):
            entry = folder / name
            found = _read(entry)
            if found is None:
                made = make()
                _write(entry, made)
                found = _read(entry)
                _drop_old(folder)
            if found is not None:
                os.utime(entry)
                return found
    except OSError as error:
        log.warning("%s can't keep the order of samples (%s): every process makes its own; set MEGAREWARM_CACHE", folder, error)
    return make() if made is None else made


def cache_folder() -> Path | None:
    """The folder of entries; None if the cache is turned off."""
    chosen = os.environ.get("MEGAREWARM_CACHE")
    if chosen is None:
        return Path(os.environ.get("XDG_CACHE_HOME") or home() / ".cache") / "megarewarm" / "orders"
    return Path(chosen) if chosen else None


def home() -> Path:
    """The user's home. ``OSError`` where there is none: in a container HOME may be unset, and the user without a name."""
    try:
        return Path.home()
    except (RuntimeError, KeyError) as error:
        raise OSError(errno.ENOENT, "no home: HOME is not set and the user has no name", "~") from error


def _read(entry: Path) -> Arrays | None:
    """The arrays of an entry; None if there is none, or where a byte of it is not as it was written."""
    try:
        told = json.loads((entry / "arrays.json").read_text(encoding="utf-8"))
        if not isinstance(told, dict) or not all(map(is_name, told)):
            return None
        arrays = {}
        for name, (shape, checksum) in told.items():
            if _checksum(entry / f"{name}.npy") != checksum:
                return None
            arrays[name] = np.load(entry / f"{name}.npy", mmap_mode="r" if shape[0] else None, allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError, TypeError, LookupError, SyntaxError):  # what damaged files lead to
        return None
    return arrays if all(list(arrays[name].shape) == shape for name, (shape, _) in told.items()) else None


def _checksum(path: Path) -> int:
    """CRC-32: against disks, not people; 1 s for 1 to 3 GB, where making an order of that size takes a minute."""
    found = 0
    with open(path, "rb") as file:
        while block := file.read(2**22):
            found = zlib.crc32(block, found)
    return found


def _write(entry: Path, arrays: Arrays) -> None:
    # the lock is held, so what is there of that name was left by a kill; mkdtemp's 0700 would shut others out of a shared cache
    partial = entry.with_name(f"{entry.name}{PART}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array, allow_pickle=False)
        told = {name: (array.shape, _checksum(partial / f"{name}.npy")) for name, array in arrays.items()}
        (partial / "arrays.json").write_text(json.dumps(told), encoding="utf-8")
        publish_folder(partial, entry, lambda: shutil.rmtree(entry, ignore_errors=True))  # what was there could not be read
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _drop_old(folder: Path) -> None:
    """Remove an entry; processes that use it keep their mapped files until they end."""
    entries = sorted(
        (path for path in folder.iterdir() if path.is_dir() and path.name != OWN_REPLAY), key=lambda path: path.stat().st_mtime
    )
    for entry in entries[:-KEPT]:
        shutil.rmtree(entry, ignore_errors=True)
        entry.with_name(f"{entry.name}.lock").unlink(missing_ok=True)
