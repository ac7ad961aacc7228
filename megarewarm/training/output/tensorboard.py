"""A run's TensorBoard writer. Its failures never stop training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

_TRIES = 3


class Board:
    """Writes scalars into ``folder``. After a failure it starts a new event file and calls ``say``; it gives up after three.
    The numbers of metrics.jsonl are the run's record; lost curves can be redrawn from them."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make = lambda: SummaryWriter(str(folder))
        self._folder, self._say = folder, say
        self._failures = 0
        self._writer: SummaryWriter | None = None
        self._guarded(self._open)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to each curve."""
        if self._writer is None and 0 < self._failures < _TRIES:
            self._guarded(self._open)
        if self._writer is not None:
            self._guarded(lambda: self._add(step, values))

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._guarded(self._writer.close)

    def _open(self) -> None:
        self._writer = self._make()

    def _add(self, step: int, values: Mapping[str, float]) -> None:
        assert self._writer is not None
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def _guarded(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:  # also errors of its writer thread, which it re-raises
            self._writer = None
            self._failures += 1
            rest = "starting a new event file" if self._failures < _TRIES else "giving up on TensorBoard"
            self._say(f"{self._folder}: can't be written ({error.strerror or error}); {rest}, metrics.jsonl has all numbers")
