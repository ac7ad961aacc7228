"""Notes of a run from the log: messages of lower rooms that no handler would show."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.notes: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        note = record.getMessage()
        if note not in self.notes:
            self.notes.append(note)


@contextmanager
def logged_notes() -> Iterator[list[str]]:
    """A list of what megarewarm and its kernels log in this context, each line once, instead of on the terminal."""
    collector = _Collector()
    loggers = [logging.getLogger(name) for name in ("megarewarm", "megarewarm_kernels")]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(collector)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield collector.notes
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(collector)
            logger.setLevel(level)
            logger.propagate = propagate
