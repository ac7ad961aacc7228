"""The one error meant for users: a line that names the problem, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from megarewarm.untrusted import printable, redacted

# 0: done; 128 + n: stopped by signal n and saved. docs/reliability.md says what a launcher should do about each
EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3
EXIT_RANK_LOST = 4
EXIT_REPLICAS_DIFFER = 5
EXIT_OUT_OF_MEMORY = 6
EXIT_TIME_LIMIT = 75


class UserError(Exception):
    """Bad input. The message is printed as it is, without a traceback, and the process exits with ``exit_code``.

    It may quote a file, a URL, a config value or another library's message. Tokens and passwords in it are replaced by stars,
    and control characters are removed.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, message: str) -> None:
        super().__init__(redacted(printable(message)))


def nearest(name: str, known: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` for the closest known name, or an empty string if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f", did you mean '{close[0]}'?" if close else ""
