"""Train a run or an experiment: megarewarm train RUN.yml [section.key=value ...]"""

from __future__ import annotations

from collections.abc import Sequence

from megarewarm.arguments import parse_arguments
from megarewarm.arguments import run_command_line as command_line

__all__ = ["command_line", "main"]


def main(words: Sequence[str]) -> int:
    parse_arguments(words)  # --help needs no packages
    from megarewarm.main import main as train

    return train(words)
