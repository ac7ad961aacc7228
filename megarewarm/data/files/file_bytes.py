"""The bytes of a file, or of the shards of one, read at any place without a memory map."""

from __future__ import annotations

import itertools
import os
import re
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megarewarm.data.files.open_files import OPEN_FILES, kept
from megarewarm.errors import UserError

_WAITS = (0.5, 2.0)  # seconds before a failed read is repeated: network disks fail for moments
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.bin")


class FileBytes:
    """A file for reading at any place, from any thread. It must not change while the object exists. A read that the disk
    refuses is repeated after a moment, with a warning; then it raises ``UserError``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        status = path.stat()
        self.size = status.st_size
        self._state = status.st_size, status.st_mtime_ns
        self._number = kept(self)
        with self._descriptor():
            pass  # report a file that can't be opened at once

    def _descriptor(self) -> AbstractContextManager[int]:
        return OPEN_FILES.descriptor(self._number, self.path, self._state)

    def read(self, offset: int, count: int, dtype: npt.DTypeLike) -> np.ndarray:
        """``count`` items of ``dtype`` from byte ``offset`` on, (count,), read-only."""
        kind = np.dtype(dtype)
        return np.frombuffer(self.raw(int(offset), int(count) * kind.itemsize), kind)

    def gather(self, offsets: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], dtype: np.dtype) -> np.ndarray:
        """``counts`` items of ``dtype`` from each of the byte ``offsets``, one after another, (sum of counts,), read-only."""
        sizes = (counts * dtype.itemsize).tolist()
        try:
            with self._descriptor() as descriptor:
                data = b"".join(map(os.pread, itertools.repeat(descriptor), sizes, offsets.tolist()))
        except OSError:
            data = b""  # one by one, each with its own retries
        if len(data) != sum(sizes):  # something is missing, or was too long for one request
            data = b"".join(map(self.raw, offsets.tolist(), sizes))
        return np.frombuffer(data, dtype)

    def raw(self, offset: int, wanted: int) -> bytes:
        """The bytes [offset, offset + wanted)."""
        data = self._request(offset, wanted)
        while len(data) < wanted:  # Linux returns at most 2 GiB at once
            more = self._request(offset + len(data), wanted - len(data))
            if not more:
                raise UserError(f"{self.path} has become shorter while it was in use: don't write to it during a run")
            data += more
        return data

    def _request(self, offset: int, wanted: int) -> bytes:
        for wait in (*_WAITS, None):
            try:
                with self._descriptor() as descriptor:
                    return os.pread(descriptor, wanted, offset)
            except OSError as error:
                if wait is None:
                    raise UserError(
                        f"{self.path}: can't be read at byte {offset} ({error.strerror or error}, tried {len(_WAITS) + 1} "
                        f"times); check the disk, then run the same command again"
                    ) from error
                warnings.warn(f"{self.path}: a read failed ({error.strerror or error}) and is tried again", stacklevel=2)
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")


class JoinedBytes:
    """The shards of a file, read as the file itself. ``path``: what it would be called."""

    def __init__(self, path: Path, shards: Sequence[Path]) -> None:
        self.path = path
        self._shards = [FileBytes(shard) for shard in shards]
        self._ends = np.cumsum([shard.size for shard in self._shards])
        self.size = int(self._ends[-1])

    def read(self, offset: int, count: int, dtype: npt.DTypeLike) -> np.ndarray:
        """As ``FileBytes.read``."""
        kind = np.dtype(dtype)
        return np.frombuffer(self.raw(int(offset), int(count) * kind.itemsize), kind)

    def gather(self, offsets: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], dtype: np.dtype) -> np.ndarray:
        """As ``FileBytes.gather``."""
        return np.frombuffer(b"".join(map(self.raw, offsets.tolist(), (counts * dtype.itemsize).tolist())), dtype)

    def raw(self, offset: int, wanted: int) -> bytes:
        """The bytes [offset, offset + wanted), which may lie in several shards."""
        parts = []
        for k in range(int(np.searchsorted(self._ends, offset, side="right")), len(self._shards)):
            shard = self._shards[k]
            inside = offset - (int(self._ends[k]) - shard.size)
            take = min(wanted, shard.size - inside)
            parts.append(shard.raw(inside, take))
            offset, wanted = offset + take, wanted - take
            if not wanted:
                break
        if wanted:
            raise UserError(f"{self.path} has become shorter while it was in use: don't write to its shards during a run")
        return parts[0] if len(parts) == 1 else b"".join(parts)


AnyBytes = FileBytes | JoinedBytes


def find_bin(prefix: str) -> list[Path]:
    """``prefix.bin``, or else its shards ``prefix-KKKKK-of-NNNNN.bin`` in their order; [] where there is neither.

    Shards are counted up to N - 1, or up to N as Pythia's are. Raises ``UserError`` if one is missing, or there are those
    of two divisions.
    """
    whole = Path(f"{prefix}.bin")
    if whole.is_file():
        return [whole]
    found: dict[int, dict[int, Path]] = {}
    parent = whole.parent
    for path in parent.iterdir() if parent.is_dir() else ():
        if path.name.startswith(whole.stem) and (match := _SHARD.fullmatch(path.name[len(whole.stem) :])):
            found.setdefault(int(match[2]), {})[int(match[1])] = path
    if not found:
        return []
    if len(found) > 1:
        kinds = " and ".join(f"-of-{count:05}" for count in sorted(found))
        raise UserError(f"{whole}: there are shards of two divisions, {kinds}: keep one")
    ((count, shards),) = found.items()
    for k in range(max(count, max(shards) + 1)):
        if k not in shards:
            raise UserError(f"{prefix}-{k:05}-of-{count:05}.bin does not exist, other shards of {whole.name} do: copy it again")
    if max(shards) > count:
        raise UserError(f"{shards[max(shards)]} is one shard too many: at most {count:05} of {count:05}")
    return [shards[k] for k in sorted(shards)]


def open_bin(prefix: str) -> AnyBytes | None:
    """The bytes of ``prefix.bin``, whole or in shards; None if there are none. Raises as ``find_bin``."""
    files = find_bin(prefix)
    if not files:
        return None
    whole = Path(f"{prefix}.bin")
    return FileBytes(whole) if files == [whole] else JoinedBytes(whole, files)
