"""The cache of orders: made once, found again, never stale, never in the way."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megarewarm.data.files.token_file import open_tokens
from megarewarm.data.order import array_cache, samples
from megarewarm.data.order.array_cache import cached
from megarewarm.data.order.samples import MegatronSamples, NeoxSamples
from tests.support.tiny import write_tokens


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEGAREWARM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    return {"a": np.random.default_rng(seed).integers(0, 99, 1000), "none": np.empty(0, np.int32)}


def never() -> dict[str, np.ndarray]:
    raise AssertionError("made again")


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


def test_made_once_and_mapped(folder: Path) -> None:
    first = cached({"seed": 1}, arrays)
    assert_same(first, arrays())
    assert isinstance(first["a"], np.memmap) and not first["a"].flags.writeable
    assert_same(cached({"seed": 1}, never), arrays())
    assert_same(cached({"seed": 2}, lambda: arrays(5)), arrays(5))
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("harm", ["truncate", "remove", "empty", "value", "dtype"])
def test_an_entry_that_is_not_whole_is_made_again(folder: Path, harm: str) -> None:
    cached({"seed": 1}, arrays)
    (file,) = folder.glob("*/a.npy")
    if harm == "remove":
        file.unlink()
    elif harm in ("value", "dtype"):  # a bit of a number, or the header's letter for signed integers
        content = bytearray(file.read_bytes())
        place = -17 if harm == "value" else content.index(b"<i8") + 1
        content[place] = content[place] ^ 4 if harm == "value" else ord("u")
        file.write_bytes(content)
    else:
        os.truncate(file, 0 if harm == "empty" else 500)
    assert_same(cached({"seed": 1}, arrays), arrays())
    assert_same(cached({"seed": 1}, never), arrays())


def test_without_a_place_or_turned_off_it_is_made_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEGAREWARM_CACHE", str(tmp_path / "file"))
    assert_same(cached({"seed": 1}, arrays), arrays())
    assert "can't keep the order of samples" in caplog.text
    monkeypatch.setenv("MEGAREWARM_CACHE", "")
    assert_same(cached({"seed": 1}, arrays), arrays())
    monkeypatch.delenv("MEGAREWARM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert isinstance(cached({"seed": 1}, arrays)["a"], np.memmap) and (tmp_path / "xdg/megarewarm/orders").is_dir()


def test_what_was_not_used_for_long_goes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_cache, "KEPT", 3)
    for seed in range(3):
        cached({"seed": seed}, partial(arrays, seed))
        os.utime(max(folder.glob("*/"), key=os.path.getmtime), (seed, seed))
    cached({"seed": 0}, never)  # used again, so it stays
    cached({"seed": 9}, arrays)
    cached({"seed": 0}, never)
    cached({"seed": 2}, never)
    with pytest.raises(AssertionError, match="made again"):
        cached({"seed": 1}, never)


def _make_slowly(tally: str) -> dict[str, np.ndarray]:
    with open(tally, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(5.0)  # the first is killed meanwhile, however slow the machine
    return arrays()


def _ask(tally: str, answers) -> None:
    answers.put(int(cached({"seed": 1}, lambda: _make_slowly(tally))["a"].sum()))


def test_of_many_that_ask_at_once_one_makes_it_and_a_killed_one_leaves_it_to_the_next(folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    tally, answers = tmp_path / "tally", context.SimpleQueue()
    asking = [context.Process(target=_ask, args=(str(tally), answers)) for _ in range(5)]
    asking[0].start()
    while not (tally.exists() and tally.read_text()):
        time.sleep(0.01)
    for process in asking[1:]:
        process.start()
    pid = asking[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    for process in asking:
        process.join(60)
    assert [answers.get() for _ in asking[1:]] == [int(arrays()["a"].sum())] * 4
    assert len(tally.read_text().split()) == 2, "the one that was killed, and one of the others"


@pytest.mark.parametrize("kind", [NeoxSamples, MegatronSamples])
def test_an_order_out_of_the_cache_is_the_order(folder: Path, tmp_path: Path, kind, monkeypatch) -> None:
    view = open_tokens(write_tokens(tmp_path / "file", 1)).view(2, 35)
    plain = kind(view, 16, 1234, 400)
    assert not folder.exists(), "small orders are not kept"
    monkeypatch.setattr(samples, "CACHED", 0)
    kept = kind(view, 16, 1234, 400)
    monkeypatch.setattr(kind, "_make", never)
    again = kind(view, 16, 1234, 400)
    for order in (kept, again):
        assert np.array_equal(order.document_order, plain.document_order) and np.array_equal(order.shuffle, plain.shuffle)
        assert all(np.array_equal(order.sample(i), plain.sample(i)) for i in range(0, plain.num_samples, 7))
    for other in [(view, 16, 1235, 400), (view, 17, 1234, 400), (view, 16, 1234, 900), (view.file.view(3, 35), 16, 1234, 400)]:
        with pytest.raises(TypeError):  # it would have to be made
            kind(*other)
    assert {path.parent for path in tmp_path.glob("file*")} == {tmp_path} and len(list(tmp_path.glob("file*"))) == 2
