"""The one error a user is meant to read: a line that names the thing, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from megarewarm.untrusted import redacted

EXIT_BAD_INPUT = 2


class UserError(Exception):
    """Bad input. The message is printed as it is, without a traceback, and the process exits with code 2.

    Tokens and passwords in it are replaced by stars: it may quote a URL, a config's value or the words of another library.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


def nearest(name: str, known: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` for the closest known name, or an empty string where nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f", did you mean '{close[0]}'?" if close else ""
