"""Rows of ids in which the first token of each document, and places that hold none, are marked by numbers below 0."""

from __future__ import annotations

from typing import Any

PAD = -1
"""The number in a place that holds no token."""


def begun(ids: Any) -> Any:
    """``ids`` as first tokens of documents. An array or a tensor; its own inverse on those."""
    return -ids - 2


def plain(rows: Any) -> Any:
    """The ids of marked ``rows``, an array or a tensor of integers, of the same shape; 0 where there is no token."""
    return rows * (rows >= 0) + (-rows - 2) * (rows < PAD)
