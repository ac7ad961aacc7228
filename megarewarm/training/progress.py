"""The progress bar of a run: loss, learning rate, tokens/s and the time left. Plain lines where there is no terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megarewarm.report.words import duration_text


class RunProgress:
    """Shows the steps of one run. On a terminal a live bar; in a log file a line every ``every`` steps."""

    def __init__(self, console: Console, title: str, first: int, total: int, every: int) -> None:
        self._console = console
        self._title = title
        self._total = total
        self._every = every
        self._first = first
        self._started = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=console,
            )
            self._task = self._bar.add_task(title, total=total, completed=first, numbers="")

    def __enter__(self) -> RunProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, loss: float, lr: float, tokens_per_second: float) -> str | None:
        """Show a finished step. Returns the text line where one is due."""
        numbers = f"loss {loss:.4f}  lr {lr:.2e}  {_rate(tokens_per_second)} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        if step % self._every and step != self._total:
            return None
        elapsed = time.monotonic() - self._started
        left = elapsed / max(1, step - self._first) * (self._total - step)
        line = f"{self._title}: step {step}/{self._total}  {numbers}  left {duration_text(left)}"
        if self._bar is None:
            self._console.print(line, highlight=False)
        return line

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, highlight=False)


def _rate(tokens_per_second: float) -> str:
    return f"{tokens_per_second / 1000:.1f}k" if tokens_per_second >= 1000 else f"{tokens_per_second:.0f}"
