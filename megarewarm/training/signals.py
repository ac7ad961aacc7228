"""Stopping on request: the first signal lets the step finish and a checkpoint be saved, the second ends at once."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType

from rich.console import Console

# USR1 is what Slurm is asked to send ahead of a time limit (sbatch --signal=USR1@120)
_WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Context in which SIGINT, SIGTERM and SIGUSR1 ask for a stop; ``received`` is the signal's number, or None."""

    def __init__(self, console: Console) -> None:
        self.received: int | None = None
        self._console = console
        self._previous: dict[int, signal.Handlers | object] = {}

    def __enter__(self) -> StopRequest:
        for number in _WATCHED:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            sys.exit(128 + number)
        self.received = number
        self._console.print("stopping after this step and saving; once more to stop at once", style="yellow")
