"""Messages about one run: on the console, and in log.txt if they are worth keeping."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape

from megarewarm.training.output.metrics import Metrics


@dataclass(frozen=True)
class Voice:
    """Prints lines that begin with the run's name."""

    console: Console
    name: str
    metrics: Metrics

    @property
    def width(self) -> int:
        """Characters that fit on a console line after the name."""
        return self.console.width - len(self.name) - 2

    def tell(self, line: str) -> None:
        """A line on the console and in log.txt."""
        self.metrics.text(f"{self.name}: {line}")
        self.say(escape(f"{self.name}: {line}"))

    def warn(self, line: str) -> None:
        """A line in yellow, on the console only."""
        self.console.print(f"{self.name}: {line}", style="yellow", highlight=False, markup=False)

    def say(self, markup: str) -> None:
        """A line of rich markup on the console only, as it is."""
        self.console.print(markup, highlight=False)
