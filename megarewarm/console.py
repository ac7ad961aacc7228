"""Consoles: what a terminal, a pipe or a log file can show, and how a run continues if nobody reads its output any more."""

from __future__ import annotations

import os
import sys
from typing import IO, Any, cast

from rich.console import Console

from megarewarm.process import EXIT_CLOSED_PIPE


def make_console(*, stderr: bool = False, quiet: bool = False, highlight: bool = True, lasting: bool = False) -> Console:
    """A console on stdout, or on ``stderr``. Wraps long lines on terminals only.

    ``lasting``: drop output that can't be written any more (a closed pipe, a full disk). The run continues, and its folder
    has everything.
    """
    stream = sys.stderr if stderr else sys.stdout
    file = cast("IO[str]", _Lasting(stream)) if lasting else None
    return _Console(file=file, stderr=stderr, quiet=quiet, highlight=highlight, soft_wrap=not stream.isatty())


def only_ascii(console: Console) -> bool:
    """Whether the console's encoding is not a Unicode encoding."""
    return console.options.ascii_only


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """The reader of the output closed it, as 'head' does: exit quietly."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(EXIT_CLOSED_PIPE)


class _Lasting:
    """A text stream that ignores its own failures."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            self._give_up()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        # the next flush would retry what is in the stream's buffer
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
