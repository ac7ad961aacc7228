"""Items that a thread computes ahead, at most a given number of them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Iterates over ``items``, which a thread computes up to ``depth`` ahead. Also a context manager that closes it.

    An exception in ``items`` is raised by the ``next`` that would have given the item. ``close`` ends the thread after
    the item it is working on.
    """

    def __init__(self, items: Iterable[T], depth: int = 2) -> None:
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._work, args=(items,), name="prefetch", daemon=True)
        self._thread.start()

    def _work(self, items: Iterable[T]) -> None:
        end: BaseException = StopIteration()
        try:
            for item in items:
                if self._stop.is_set():
                    return
                self._queue.put((item, None))
        except BaseException as error:
            end = error
        self._queue.put((None, end))

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._ended:
            raise StopIteration
        item, error = self._queue.get()
        if error is not None:
            self._ended = True
            self._thread.join()
            raise error
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """Stop the thread and drop what it has prepared. Further items: none."""
        self._ended = True
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
