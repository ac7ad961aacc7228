"""Consoles: what a terminal, a pipe or a log file can show, the bars on them, and how a run continues if nobody reads its
output any more."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any, cast

from rich.console import Console

from megarewarm.process import EXIT_CLOSED_PIPE

if TYPE_CHECKING:
    from rich.progress import Progress

_LINES = 30.0  # seconds between two lines in a log


def make_console(*, stderr: bool = False, quiet: bool = False, highlight: bool = True, lasting: bool = False) -> Console:
    """A console on stdout, or on ``stderr``. Wraps long lines on terminals only.

    ``lasting``: drop output that can't be written any more (a closed pipe, a full disk). The run continues, and its folder
    has everything.
    """
    stream = sys.stderr if stderr else sys.stdout
    file = cast("IO[str]", _Lasting(stream)) if lasting else None
    return _Console(file=file, stderr=stderr, quiet=quiet, highlight=highlight, soft_wrap=not stream.isatty())


def make_bar(console: Console, field: str | None = None) -> Progress:
    """Bars that vanish when they stop, on a terminal only: description, share, and the time left or the ``field`` of a task."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    last = TimeRemainingColumn() if field is None else TextColumn(f"{{task.fields[{field}]}}")
    columns = (TextColumn("{task.description}"), BarColumn(None), TaskProgressColumn(), last)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


class WorkShown:
    """What is being done, its share and speed: as a bar, or as lines in a log."""

    def __init__(self, console: Console) -> None:
        self._console, self._bar = console, make_bar(console, "speed")
        self._doing, self._began, self._said = "", (0.0, 0), 0.0

    def show(self, doing: str, done: int, total: int, speed: Callable[[float, int], str]) -> None:
        """``done`` of ``total`` (0: not known); ``speed``: from the seconds of ``doing``, and what was done in them."""
        now = time.monotonic()
        if doing != self._doing:
            self._bar.start()
            self._task = self._bar.add_task(doing, total=total or None, speed="")
            self._doing, self._began, self._said = doing, (now, done), now
        seconds = now - self._began[0]
        told = speed(seconds, done - self._began[1]) if seconds > 0.5 else ""
        self._bar.update(self._task, completed=done, speed=told)
        if self._bar.disable and now - self._said >= _LINES:
            self._said = now
            self._console.print(f"{doing}:{f' {100 * done / total:.0f} %,' if total else ''} {told}", highlight=False)

    def finish(self) -> None:
        """Remove the bar."""
        if self._doing:  # without a task it would print an empty line
            self._bar.stop()


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
