"""Where a selection keeps its work: arrays on the disk that a second start continues, and its progress."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megarewarm.files import write_whole

_SAVE_EVERY = 2.0  # seconds


class ShowProgress(Protocol):
    """Is called with what is being done, and how many of how many bytes of token ids are done."""

    def __call__(self, doing: str, done: int, total: int) -> None: ...


def _quiet(doing: str, done: int, total: int) -> None:
    del doing, done, total


class Desk:
    """Arrays in ``folder``, each under a name that depends on everything its contents depend on: ``corpus``, the identity of
    the input, and what the caller names. ``show``: the progress."""

    def __init__(self, folder: Path, corpus: Mapping[str, Any], show: ShowProgress = _quiet) -> None:
        self.folder = folder
        self.show = show
        self._corpus = dict(corpus)

    def rows(
        self,
        name: str,
        depends: Mapping[str, Any],
        shape: tuple[int, ...],
        dtype: npt.DTypeLike,
        make: Callable[[int], Iterable[npt.NDArray[Any]]],
    ) -> npt.NDArray[Any]:
        """An array of ``shape`` and ``dtype``, mapped from the disk, read-only.

        ``make(first)`` yields its rows from row ``first`` on, some at a time; a second start goes on after the last rows that
        were saved. ``depends``: all that the rows depend on besides the input's documents, as JSON; ``kept_key`` for masks.
        """
        kind = np.dtype(dtype)
        said = {"corpus": self._corpus, "depends": dict(depends), "shape": list(shape), "dtype": kind.str}
        key = hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=12).hexdigest()
        path, counted = self.folder / f"{name}-{key}.bin", self.folder / f"{name}-{key}.json"
        width = int(np.prod(shape[1:], dtype=np.int64)) * kind.itemsize
        done = json.loads(counted.read_bytes())["rows"] if counted.is_file() and path.is_file() else 0
        if done < shape[0]:
            self.folder.mkdir(parents=True, exist_ok=True)
            _append(path, counted, width, shape, kind, done, make)
        if not shape[0] or not width:
            return np.empty(shape, kind)
        return np.memmap(path, kind, "r", shape=shape)


def _append(
    path: Path,
    counted: Path,
    width: int,
    shape: tuple[int, ...],
    kind: np.dtype[Any],
    done: int,
    make: Callable[[int], Iterable[npt.NDArray[Any]]],
) -> None:
    with path.open("r+b" if done else "wb") as file:
        file.truncate(done * width)
        file.seek(done * width)
        saved = time.monotonic()
        try:
            for rows in make(done):
                if rows.shape[1:] != shape[1:]:
                    raise ValueError(f"rows of shape {rows.shape} for an array of shape {shape}")
                file.write(np.ascontiguousarray(rows, kind).data)
                done += len(rows)
                if time.monotonic() - saved >= _SAVE_EVERY:
                    _save(file.fileno(), file.flush, counted, done)
                    saved = time.monotonic()
        finally:
            _save(file.fileno(), file.flush, counted, done)
    if done != shape[0]:
        raise ValueError(f"{done} rows for an array of shape {shape}")


def _save(descriptor: int, flush: Callable[[], None], counted: Path, done: int) -> None:
    """Record ``done`` rows once they are on the disk."""
    flush()
    os.fsync(descriptor)
    write_whole(counted, json.dumps({"rows": done}).encode())


def kept_key(kept: npt.NDArray[np.bool_]) -> str:
    """Sixteen hex digits for a mask of documents."""
    return hashlib.blake2b(np.packbits(kept).tobytes(), digest_size=8).hexdigest()
