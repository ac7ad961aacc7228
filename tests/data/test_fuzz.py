"""Any bytes as .idx and .bin: read rightly or refused in one clear line, never anything else, never outside of the file."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megarewarm.data.files.index_file import HEADER, MAGIC
from megarewarm.data.files.token_file import TokenFile, open_tokens
from megarewarm.data.order.samples import MegatronSamples, PermutedSamples
from megarewarm.errors import UserError


def pair_of(sizes: list[int], code: int = 8, itemsize: int = 2) -> tuple[bytes, bytes]:
    """(.idx, .bin) by the format's description, without our writer."""
    pointers = [sum(sizes[:i]) * itemsize for i in range(len(sizes))]
    index = MAGIC + struct.pack("<QBQQ", 1, code, len(sizes), len(sizes) + 1)
    index += struct.pack(f"<{len(sizes)}i", *sizes) + struct.pack(f"<{len(sizes)}q", *pointers)
    index += struct.pack(f"<{len(sizes) + 1}q", *range(len(sizes) + 1))
    return index, bytes(range(256)) * (sum(sizes) * itemsize // 256 + 1)


def use(file: TokenFile) -> None:
    """All that training does with a file; every result is what the header promises."""
    total = 0
    for i in range(min(file.num_documents, 50)):
        assert len(file.document(i)) == file.document_sizes(i, i + 1)[0]
        assert file.document_start(i) == total
        total += len(file.document(i))
    assert len(file.read(0, file.total_tokens)) == file.total_tokens
    assert len(file.fingerprint()) == 32
    if file.total_tokens > 4:
        for samples in (PermutedSamples(file.view(), 3, 1), MegatronSamples(file.view(), 3, 1, 2)):
            assert samples.sample(0).shape == (4,)
    with pytest.raises(IndexError):
        file.read(file.total_tokens, 1)
    with pytest.raises(IndexError):
        file.read_pieces(np.array([0, file.total_tokens]), np.array([0, 1]))


def attempt(folder: Path, index: bytes, data: bytes) -> bool:
    """Whether the pair is accepted. Anything but a plain refusal fails the test."""
    (folder / "x.idx").write_bytes(index)
    (folder / "x.bin").write_bytes(data)
    try:
        file = open_tokens(folder / "x")
    except UserError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
        return False
    use(file)
    return True


@st.composite
def damaged(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A right pair, some bytes or whole numbers of whose index are replaced, cut or added to."""
    sizes = draw(st.lists(st.integers(0, 9), max_size=6))
    index, data = pair_of(sizes, *draw(st.sampled_from([(8, 2), (4, 4), (1, 1), (5, 8)])))
    itemsize = {8: 2, 4: 4, 1: 1, 5: 8}[index[17]]
    data = data[: sum(sizes) * itemsize]
    changed = bytearray(index)
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, max(len(changed) - 1, 0)))
        value = draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, b"\0" * 8, struct.pack("<q", 2**62)]))
        changed[place : place + len(value)] = value
    cut = draw(st.integers(0, 12))
    if draw(st.booleans()):
        changed = changed[: len(changed) - cut]
    else:
        changed += bytes(draw(st.integers(0, 12)))
    return bytes(changed), data[: len(data) - draw(st.integers(0, 2))]


def check_damaged(folder: Path, pair: tuple[bytes, bytes]) -> None:
    attempt(folder, *pair)


quick = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
long = settings(max_examples=30_000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(pair=damaged())
def test_damaged_pairs(tmp_path: Path, pair: tuple[bytes, bytes]) -> None:
    check_damaged(tmp_path, pair)


@pytest.mark.slow
@long
@given(pair=damaged())
def test_many_damaged_pairs(tmp_path: Path, pair: tuple[bytes, bytes]) -> None:
    check_damaged(tmp_path, pair)


@quick
@given(
    start=st.sampled_from([b"", MAGIC, HEADER.pack(MAGIC, 1, 8, 1, 2)]),
    rest=st.binary(max_size=80),
    data=st.binary(max_size=40),
)
def test_random_bytes(tmp_path: Path, start: bytes, rest: bytes, data: bytes) -> None:
    attempt(tmp_path, start + rest, data)


@quick
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_whole_pairs_are_accepted(tmp_path: Path, sizes: list[int]) -> None:
    index, data = pair_of(sizes)
    assert attempt(tmp_path, index, data[: sum(sizes) * 2])
