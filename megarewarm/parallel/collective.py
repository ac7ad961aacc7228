"""The mark of functions that all ranks must call: if one rank does not, the others wait until the timeout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

watch: Callable[[str], None] | None = None
"""Called with the name of each marked function that is entered; None outside of tests, which compare the ranks with it."""


def collective(function: Callable[P, T]) -> Callable[P, T]:
    """Mark ``function`` as one that all ranks call, in the same order, unless its keyword ``alone`` is true."""
    name = f"{function.__module__}.{function.__qualname__}"

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if watch is not None and not kwargs.get("alone"):
            watch(name)
        return function(*args, **kwargs)

    return call
