"""Damage anywhere in token files of every form, read in every order: refused in one line, or without effect on the samples, or
(an id that another id of the vocabulary has taken the place of) found by ``verify`` with the manifest."""

from __future__ import annotations

import hashlib
import json
import struct
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megarewarm.config.data import DataConfig
from megarewarm.data.files.index_file import CODES, MAGIC
from megarewarm.data.files.inspection import verify
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.files.token_file import open_tokens
from megarewarm.data.mixture.batches import build_training_batches
from megarewarm.data.mixture.phases import Phase
from megarewarm.data.order import samples
from megarewarm.errors import UserError

S, VOCABULARY, WANTED = 3, 300, 30
INDICES = ("plain", "modes", "merged", "grouped", "none")
ORDERS = ("permuted", "neox", "megatron", "rows")
Files = dict[str, bytes]


class Form(NamedTuple):
    """How the tokens are stored and read. ``cuts``: where the .bin is cut into shards; none for a whole one."""

    index: str  # type: ignore[assignment]
    code: int
    cuts: tuple[int, ...]
    inclusive: bool
    order: str
    manifest: bool


def files_of(form: Form, documents: list[list[int]]) -> Files:
    """The files, by the descriptions of their formats and without our writer."""
    kind = np.dtype(CODES[form.code]).newbyteorder("<")
    data = np.array([token for document in documents for token in document], kind).tobytes()
    sizes, n = [len(document) for document in documents], len(documents)
    pointers = [sum(sizes[:i]) * kind.itemsize for i in range(n)]
    ends = {"merged": [0], "grouped": [*range(0, n, 2), n]}.get(form.index, list(range(n + 1)))
    index = MAGIC + struct.pack("<QBQQ", 1, form.code, n, len(ends)) + struct.pack(f"<{n}i", *sizes)
    index += struct.pack(f"<{n}q", *pointers) + struct.pack(f"<{len(ends)}q", *ends) + bytes(n if form.index == "modes" else 0)
    bounds = [0, *sorted(min(cut, len(data)) for cut in form.cuts), len(data)]
    shards = [data[first:last] for first, last in pairwise(bounds)]
    count = len(shards) - form.inclusive
    names = [f"x-{k:05}-of-{count:05}.bin" for k in range(len(shards))] if len(shards) > 1 else ["x.bin"]
    files = dict(zip(names, shards, strict=True)) | ({} if form.index == "none" else {"x.idx": index})
    if form.manifest:
        sums = {"bin": hashlib.sha256(data).hexdigest(), "idx": hashlib.sha256(index).hexdigest()}
        said = {"documents": n, "tokens": sum(sizes), "dtype": kind.name, "sha256": sums}
        files["x.json"] = json.dumps(said).encode()
    return files


def lay_down(folder: Path, files: Files) -> None:
    for path in folder.iterdir():
        path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def rows(folder: Path, form: Form) -> np.ndarray:
    """All that a run reads."""
    bare = form.index == "none"
    source = {"path": str(folder / ("x.bin" if bare else "x")), "max_epochs": None}
    source |= {"dtype": CODES[form.code]} if bare else {}
    source |= {"layout": "rows"} if form.order == "rows" else {}
    order = "permuted" if form.order == "rows" else form.order
    data = DataConfig(sequence_length=S, train=[source], order=order)
    return build_training_batches(TokenFiles(data, VOCABULARY), [Phase(0, data.train)], total_samples=WANTED).rows(0, WANTED)


@st.composite
def stored(draw: st.DrawFn) -> tuple[Form, Files]:
    index, order = draw(st.sampled_from(INDICES)), draw(st.sampled_from(ORDERS))
    code = draw(st.sampled_from([4, 8] if index == "none" else [1, 3, 4, 5, 8]))
    highest = min(VOCABULARY, np.iinfo(CODES[code]).max + 1) - 1
    sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(lambda sizes: sum(sizes) > S))
    if order == "rows":
        sizes[-1] += -sum(sizes) % (S + 1)
    documents = [draw(st.lists(st.integers(0, highest), min_size=size, max_size=size)) for size in sizes]
    cuts = draw(st.lists(st.integers(0, 60), max_size=3))
    form = Form(index, code, tuple(cuts), draw(st.booleans()), order, draw(st.booleans()))
    return form, files_of(form, documents)


@st.composite
def damaged(draw: st.DrawFn) -> tuple[Form, Files, Files]:
    """(form, whole files, damaged ones)"""
    form, files = draw(stored())
    harmed = dict(files)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(harmed.keys() - {"x.json"})))
        content = harmed[name]
        place = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.sampled_from(["bit", "bytes", "number", "zeros", "cut", "more", "moved", "swapped", "gone"])):
            case "bit" if content:
                flipped = content[place] ^ 1 << draw(st.integers(0, 7))
                harmed[name] = content[:place] + bytes([flipped]) + content[place + 1 :]
            case "bytes":
                new = draw(st.binary(min_size=1, max_size=8))
                harmed[name] = (content[:place] + new + content[place + len(new) :])[: len(content)]
            case "number" if len(content) >= 8:  # one whole number of any field
                width = draw(st.sampled_from([1, 2, 4, 8]))
                place -= place % width
                old = int.from_bytes(content[place : place + width], "little", signed=True)
                new = draw(st.sampled_from([old + 1, old - 1, old + 2, -old, 0, -1, 2 ** (8 * width - 1) - 1]))
                new %= 2 ** (8 * width)
                harmed[name] = (content[:place] + new.to_bytes(width, "little") + content[place + width :])[: len(content)]
            case "zeros":  # a block that never reached the disk
                length = draw(st.integers(1, 40))
                harmed[name] = (content[:place] + bytes(length) + content[place + length :])[: len(content)]
            case "cut":
                harmed[name] = content[: len(content) - draw(st.integers(1, 16))]
            case "more":
                harmed[name] = content + draw(st.binary(min_size=1, max_size=16))
            case "moved":  # everything from here on lies one byte further
                harmed[name] = (content[:place] + b"\0" + content[place:])[: len(content)]
            case "swapped":
                other = draw(st.sampled_from(sorted(harmed.keys() - {"x.json"})))
                harmed[name], harmed[other] = harmed[other], harmed[name]
            case "gone" if len(harmed.keys() - {"x.json"}) > 1:
                del harmed[name]
    return form, files, harmed


def check(folder: Path, case: tuple[Form, Files, Files]) -> str:
    form, whole, harmed = case
    lay_down(folder, whole)
    expected = rows(folder, form)
    lay_down(folder, harmed)
    bins = [b"".join(files[name] for name in sorted(files) if name.endswith(".bin")) for files in (whole, harmed)]
    try:
        found = rows(folder, form)
    except UserError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
        outcome = "refused"
    else:
        outcome = "without effect" if np.array_equal(found, expected) else "other ids"
        # only ids that are in the vocabulary, and the end of a file without index, are taken for what they are
        assert outcome != "other ids" or bins[0] != bins[1]
        assert outcome != "other ids" or len(bins[0]) == len(bins[1]) or (form.index == "none" and not form.manifest)
    assert outcome == "without effect" or harmed != whole
    if form.manifest and (bins[0] != bins[1] or whole.get("x.idx") != harmed.get("x.idx")):
        with pytest.raises(UserError) as told:
            verify(open_tokens(folder / ("x.bin" if form.index == "none" else "x"), dtype=_dtype(form)), VOCABULARY)
        assert "\n" not in str(told.value) and str(folder) in str(told.value)
    return outcome


def _dtype(form: Form) -> str | None:
    return CODES[form.code] if form.index == "none" else None


quick = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
long = settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("cached", [False, True])
@quick
@given(case=damaged())
def test_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool, case: tuple[Form, Files, Files]) -> None:
    """``cached``: the orders of samples of the whole file are on the disk when the damaged one is opened."""
    monkeypatch.setenv("MEGAREWARM_CACHE", str(tmp_path / "cache") if cached else "")
    monkeypatch.setattr(samples, "CACHED", 0 if cached else 2**21)
    (tmp_path / "data").mkdir(exist_ok=True)
    check(tmp_path / "data", case)


@pytest.mark.slow
@long
@given(case=damaged())
def test_much_damage(tmp_path: Path, case: tuple[Form, Files, Files]) -> None:
    check(tmp_path, case)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("index", INDICES)
def test_every_single_bit(tmp_path: Path, index: str, order: str) -> None:
    """Of one pair, all of them: no field of any file is left out."""
    form = Form(index, 8, (13,), True, order, manifest=True)
    whole = files_of(form, [[1, 2, 3], [], [4, 5, 6, 7], [8, 9, 10, 11, 12]])
    outcomes = set()
    for name in whole.keys() - {"x.json"}:
        for place in range(len(whole[name])):
            harmed = bytearray(whole[name])
            harmed[place] ^= 1 << place % 8
            outcomes.add(check(tmp_path, (form, whole, whole | {name: bytes(harmed)})))
    assert {"refused", "other ids"} <= outcomes
