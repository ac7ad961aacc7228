"""Checks of untrusted input: names that must not lead out of a folder, secrets that must not be printed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

_HIDDEN = "***"
_LONGEST_NAME = 255  # bytes, the limit of file systems
_SHORTEST_SECRET = 12  # characters: a shorter value of such a variable may be a word that occurs by chance
_IN_URL = re.compile(r"(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^\s/?#@]*@")
_OF_THE_HUB = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_VARIABLE = re.compile(r"(?:^|_)(?:TOKEN|API_KEY|ACCESS_KEY|SECRET|PASSWORD)$")


def is_name(value: object) -> bool:
    """Whether ``value`` names a file in a folder, and can't name anything outside of it."""
    return (
        isinstance(value, str)
        and value not in ("", ".", "..")
        and not any(sign in value for sign in "/\\\0\r\n")
        and len(value.encode("utf-8", "surrogatepass")) <= _LONGEST_NAME
    )


def is_inside(value: object) -> bool:
    """Whether ``value`` is a relative path that stays below its folder, judged by its text alone."""
    return isinstance(value, str) and not value.startswith("/") and all(map(is_name, PurePosixPath(value).parts or ("",)))


def printable(text: str) -> str:
    """``text`` with control characters replaced, except line breaks."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "\N{REPLACEMENT CHARACTER}" for sign in text)


def one_line(text: str, most: int = 200) -> str:
    """The message of another program or library, shortened to a part of one line."""
    return printable(" ".join(text.split()))[:most]


def secrets_of(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The values of variables such as WANDB_API_KEY and HF_TOKEN."""
    return [value for name, value in environment.items() if _VARIABLE.search(name) and len(value) >= _SHORTEST_SECRET]


def is_secret(variable: str) -> bool:
    """Whether the name of the environment ``variable`` is one that tokens and passwords have."""
    return _VARIABLE.search(variable.upper()) is not None


def redacted(text: str, secrets: Sequence[str] | None = None) -> str:
    """``text`` without secrets: user and password of a URL, tokens of the Hugging Face hub, and ``secrets``, by default those
    of the environment."""
    text = _IN_URL.sub(rf"\g<scheme>{_HIDDEN}@", text)
    text = _OF_THE_HUB.sub(_HIDDEN, text)
    for secret in secrets_of() if secrets is None else secrets:
        text = text.replace(secret, _HIDDEN)
    return text
