"""The progress of a run on the console: a bar on a terminal, plain lines elsewhere; loss, rate, tokens/s, the time left."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from megarewarm.config.schema import RunConfig
from megarewarm.spelling import duration_text
from megarewarm.training.start.evaluation_cost import EvaluationCost

_LINE_EVERY = 60.0  # seconds, of a long evaluation where there is no bar


class _Name(ProgressColumn):
    """The name of a run, cut off on a narrow terminal: names and the bar are, numbers are not."""

    def render(self, task: Task) -> Text:
        return Text(task.description, style="bold", no_wrap=True, overflow="ellipsis")


class RunProgress:
    """Shows the steps and evaluations of one run. On a terminal a live bar; in a log file a line every ``logging.every`` steps.

    ``first``: steps that were completed before; ``evaluations``: those of the run, None if there are none: what is left of
    them is part of the time that is left.
    """

    def __init__(self, console: Console, config: RunConfig, first: int, evaluations: EvaluationCost | None) -> None:
        self._console, self._title, self._every = console, config.name, config.logging.every
        self._first, self._total = first, config.total_steps
        self._tokens_per_step, self._evaluations = config.tokens_per_step, evaluations
        self._started = time.monotonic()
        self._evaluated, self._evaluating = 0, 0.0  # tokens, seconds
        self._shown = self._started
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                _Name(),
                BarColumn(bar_width=None),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[numbers]}"),
                console=console,
                expand=True,
            )
            self._task = self._bar.add_task(config.name, total=config.total_steps, completed=first, numbers="")

    def __enter__(self) -> RunProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, loss: float, lr: float, tokens_per_second: float) -> str | None:
        """Show a finished step. Returns the text line where one is due."""
        left, self._shown = duration_text(self._left(step)), time.monotonic()
        rate = _rate(tokens_per_second)
        if self._bar is not None:
            numbers = f"loss {loss:.4f} lr {lr:.2e} {rate} tok/s left {left}"
            self._bar.update(self._task, completed=step, numbers=numbers)
        if step % self._every and step != self._total:
            return None
        line = f"{self._title}: step {step}/{self._total}  loss {loss:.4f}  lr {lr:.2e}  {rate} tokens/s  left {left}"
        if self._bar is None:
            self._console.print(line, highlight=False)
        return line

    def evaluating(self, name: str, done: int, portions: int, does: str = "evaluates") -> None:
        """Show how much of a validation set is evaluated, or what else the run ``does``; in a log file only what takes long."""
        told = f"{does} {name} {100 * done // max(portions, 1)} %"
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, numbers=told)
        elif now - self._shown > _LINE_EVERY:
            self._shown = now
            self._console.print(f"{self._title}: {told}", highlight=False)

    def evaluated(self, tokens: int, seconds: float) -> None:
        """Record that an evaluation of ``tokens`` in all took ``seconds``."""
        self._evaluated += tokens
        self._evaluating += seconds
        self._shown = time.monotonic()

    def aside(self, seconds: float) -> None:
        """Record that something took ``seconds`` that no step will take."""
        self._started += seconds
        self._shown = time.monotonic()

    def _left(self, step: int) -> float:
        """Seconds left at the pace so far, of steps with everything that follows them and of evaluations; before the first
        evaluation, these are assumed to take a third of training on as many tokens."""
        per_step = (time.monotonic() - self._started - self._evaluating) / max(1, step - self._first)
        left = (self._total - step) * per_step
        if self._evaluations is None:
            return left
        per_token = self._evaluating / self._evaluated if self._evaluated else per_step / self._tokens_per_step / 3
        return left + self._evaluations.after(step - 1) * per_token


def loss_line(when: str, losses: Mapping[str, float], start: Mapping[str, float], width: int) -> str:
    """'step 20: old 4.0312 (-0.0211), new 3.2210': losses, with their changes since the start if all of it fits ``width``."""
    changes = {name: f" ({loss - start[name]:+.4f})" if name in start else "" for name, loss in losses.items()}
    for shown in (changes, dict.fromkeys(losses, "")):
        line = f"{when}: {', '.join(f'{name} {loss:.4f}{shown[name]}' for name, loss in losses.items())}"
        if len(line) <= width:
            break
    return line


def _rate(tokens_per_second: float) -> str:
    return f"{tokens_per_second / 1000:.1f}k" if tokens_per_second >= 1000 else f"{tokens_per_second:.0f}"
