"""Stopping on request: after the first signal the run saves as soon as all ranks agree, a second one ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console

from megarewarm.parallel.agreement import all_reduce_maxima
from megarewarm.process import in_main_thread

# Slurm sends USR1 ahead of a time limit (sbatch --signal=USR1@120)
_WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_SAME_REQUEST = 2.0  # seconds: a launcher forwards signals that the terminal has sent already
_ASK_EVERY = 1.0  # seconds between two exchanges among ranks


class StopRequest:
    """Context in which SIGINT, SIGTERM and SIGUSR1 ask for a stop; ``received`` is the signal's number, or None. A callback of
    the run asks for it by setting ``by_callback``.

    Signals are counted by a thread that the C handler wakes, since the interpreter's own runs only between two instructions of
    the main thread: a rank that waits in a collective for one that hangs would never see the second. In another thread than
    the main one nothing can be watched: signals then do what the main thread has them do.
    """

    def __init__(self, console: Console) -> None:
        self.received: int | None = None
        self.by_callback = False
        self._console = console
        self._previous: dict[int, Any] = {}
        self._first = 0.0

    def __enter__(self) -> StopRequest:
        if not in_main_thread():
            return self
        self._reads, self._writes = os.pipe()
        os.set_blocking(self._writes, False)
        for number in _WATCHED:
            self._previous[number] = signal.signal(number, self._handle)
        self._woken = signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._count, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._previous:
            return
        signal.set_wakeup_fd(self._woken)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._writes)  # which ends the thread
        self._thread.join()
        os.close(self._reads)

    @property
    def is_asked(self) -> bool:
        return self.by_callback or self.received is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """No-op: the thread counts the signal. Without a handler it would have its default effect."""

    def _count(self) -> None:
        while numbers := os.read(self._reads, 64):
            for number in numbers:
                if number in _WATCHED:
                    self._take(number)

    def _take(self, number: int) -> None:
        if self.received is None:
            self.received, self._first = number, time.monotonic()
            self._console.print("stopping and saving (again to stop at once)", style="yellow")
        elif time.monotonic() - self._first > _SAME_REQUEST:
            print("stopped at once, without saving", file=sys.stderr, flush=True)
            # not through the interpreter, whose main thread may wait forever
            os._exit(128 + number)


class StopAgreed(Exception):
    """All ranks have agreed to stop, at the same place within a step or an evaluation."""


class Lookout:
    """A ``Between`` that raises ``StopAgreed``, on all ranks at the same place, once one of them has received a signal.

    A single rank checks each time. Several ranks exchange the maxima of two numbers about once per second, after as many
    portions as the slowest of them computes in that time, a number that all of them then know. So none is left in a
    collective, and short portions cost nothing.
    """

    def __init__(self, stop: StopRequest, ranks: int) -> None:
        self._stop, self._several = stop, ranks > 1
        self._every = self._left = 1
        self._asked = time.monotonic()

    def __call__(self, done: int, portions: int) -> None:
        self._left -= 1
        if self._several and self._left:
            return
        told, seconds = all_reduce_maxima([self._stop.is_asked, time.monotonic() - self._asked])
        if told:
            raise StopAgreed
        # by a factor of two at most, because the pace may change; all ranks compute the same number
        grown = 2 * self._every if self._several else 1
        self._every = self._left = max(1, int(min(grown, self._every * _ASK_EVERY / max(seconds, 1e-6))))
        self._asked = time.monotonic()
