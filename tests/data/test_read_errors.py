"""Disks that refuse a read: a moment is waited out, more than that is said with the file's name."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from megarewarm.data.files import file_bytes
from megarewarm.data.files.token_file import TokenFile, open_tokens
from megarewarm.errors import UserError
from tests.support.tiny import write_tokens


@pytest.fixture
def tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenFile:
    monkeypatch.setattr(file_bytes, "_WAITS", (0.01, 0.01))
    return open_tokens(write_tokens(tmp_path / "tokens", 1))


def refuse(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Let the next ``times`` reads fail as a network's disk does."""
    read, left = os.pread, times

    def failing(*request: int) -> bytes:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(*request)

    monkeypatch.setattr(os, "pread", failing)


@pytest.mark.parametrize("times", [1, 2])
def test_a_read_that_fails_for_a_moment_gives_the_same_tokens(
    tokens: TokenFile, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    whole, pieces = tokens.read(3, 100), (np.array([5, 40, 90]), np.array([10, 20, 30]))
    gathered = tokens.read_pieces(*pieces)
    refuse(monkeypatch, times)
    with pytest.warns(UserWarning, match=r"tokens\.bin: a read failed \(Input/output error\) and is tried again"):
        assert np.array_equal(tokens.read(3, 100), whole)
    refuse(monkeypatch, times + 1)  # the first of them is the attempt to gather all at once
    with pytest.warns(UserWarning, match="tried again"):
        assert np.array_equal(tokens.read_pieces(*pieces), gathered)


def test_a_disk_that_stays_broken_is_named(tokens: TokenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, 99)
    with (
        pytest.warns(UserWarning),
        pytest.raises(UserError, match=r"tokens\.bin: can't be read at byte 6 \(Input/output error, tried 3 times\)"),
    ):
        tokens.read(3, 100)
