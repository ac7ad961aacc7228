"""Training batches: the same rows however they are cut, limits that speak up, and the prefetching thread."""

from __future__ import annotations

import math
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.config.data import DataConfig
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.files.token_file import TokenFileWriter, open_tokens
from megarewarm.data.mixture.batches import TrainingBatches, build_training_batches
from megarewarm.data.mixture.phases import Phase
from megarewarm.data.mixture.prefetch import Prefetch
from megarewarm.data.order.samples import MegatronSamples, NeoxSamples
from megarewarm.errors import UserError

S = 4
VOCABULARY = 10_000


def write(prefix: Path, first: int, tokens: int, document: int = 50, dtype: type = np.uint16) -> str:
    """A file whose tokens count up from ``first``."""
    with TokenFileWriter(prefix, dtype, overwrite=True) as writer:
        for start in range(first, first + tokens, document):
            writer.add_document(np.arange(start, min(start + document, first + tokens)))
    return str(prefix)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    return [write(folder / name, 1000 * i, tokens) for i, (name, tokens) in enumerate([("a", 401), ("b", 805), ("c", 97)])]


def build(sources: list[dict], total: int, vocab_size: int = VOCABULARY, **data: object) -> TrainingBatches:
    config = DataConfig(sequence_length=S, train=sources, **data)
    return build_training_batches(TokenFiles(config, vocab_size), [Phase(0, config.train)], total_samples=total)


def three(paths: list[str], **extra: object) -> list[dict]:
    return [{"path": p, "weight": w, "max_epochs": None} | extra for p, w in zip(paths, (0.5, 0.3, 0.2), strict=True)]


ORDERS = ["permuted", "neox", "megatron"]


@pytest.mark.parametrize("order", ORDERS)
def test_rows_come_from_the_blend_of_the_weights(paths, order):
    batches = build(three(paths), 300, order=order)
    rows = batches.rows(0, 300)
    assert rows.shape == (300, S + 1) and rows.dtype == np.int64
    sources = rows[:, 0] // 1000
    assert sources[:10].tolist() == [0, 1, 2, 0, 1, 0, 2, 0, 1, 0]
    assert np.bincount(sources).tolist() == [150, 90, 60]
    if order == "permuted":
        assert (np.diff(rows, axis=1) == 1).all()  # windows of neighbouring tokens
        assert len(np.unique(rows[sources == 1, 0])) == 90  # b is not yet read through, so nothing twice
        assert (rows[:, 0] % S == 0).all()
    assert batches.tokens_per_source(0, 300) == {"a": 150 * S, "b": 90 * S, "c": 60 * S}
    assert batches.tokens_per_source(10, 5) == {name: int((sources[10:15] == i).sum()) * S for i, name in enumerate("abc")}


@pytest.mark.parametrize("total", [69, 70, 72, 205])
@pytest.mark.parametrize(("order", "kind"), [("neox", NeoxSamples), ("megatron", MegatronSamples)])
def test_shuffled_orders_ask_for_half_a_percent_more(paths, order, kind, total):
    # c has 24 samples an epoch. A third of 72 and half a percent is more than that, so it is shuffled over two epochs; of
    # 70 only for Megatron-LM, which rounds up before (24 -> 24.12) and after, where GPT-NeoX asks for 23.45; of 69 for none.
    share = total / 3
    wanted = {"neox": math.ceil(share * 1.005), "megatron": math.ceil(math.ceil(share) * 1.005)}[order]
    assert wanted > 24 or total in (69, 70)
    rows = build(three(paths, weight=1.0), total, order=order).rows(0, total)
    for i, path in enumerate(paths):
        samples = kind(open_tokens(path).view(), S, 1234, wanted)
        mine = rows[rows[:, 0] // 1000 == i]
        assert np.array_equal(mine, np.stack([samples.sample(k) for k in range(len(mine))]))


def test_single_source_in_neox_order_asks_for_the_exact_number(golden):
    config = DataConfig(
        sequence_length=64,
        order="neox",
        train=[{"path": str(golden / "A_text_document"), "split": "900,50,50"}],
    )
    batches = build_training_batches(TokenFiles(config, 512), [Phase(0, config.train)], total_samples=160)
    maps = {
        key: np.load(golden / "indexmaps" / f"A_text_document_train_indexmap_160ns_64sl_1234s_packedpi_ac_{key}_idx.npy")
        for key in ("doc", "sample", "shuffle")
    }
    file = open_tokens(golden / "A_text_document")
    text = np.concatenate([file.document(int(d)) for d in maps["doc"]]).astype(np.int64)
    expected = [text[k * 64 : k * 64 + 65] for k in maps["shuffle"][:160].astype(int)]
    assert np.array_equal(batches.rows(0, 160), np.stack(expected))


@pytest.mark.parametrize("order", ORDERS)
@settings(max_examples=25, deadline=None)
@given(step=st.integers(0, 11), world=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]))
def test_shares_of_all_ranks_are_the_batch_for_every_number_of_ranks(paths, order, step, world):
    batches = build(three(paths), 300, order=order)
    shares = [batches.share(24 * step, 24, rank, world) for rank in range(world)]
    assert {len(share) for share in shares} == {24 // world}
    assert np.array_equal(np.concatenate(shares), batches.rows(24 * step, 24))


@pytest.mark.parametrize("order", ORDERS)
def test_any_cut_gives_the_same_rows(paths, order):
    batches = build(three(paths), 300, order=order)
    whole = batches.rows(0, 300)
    for first, count in ((0, 1), (299, 1), (17, 100), (100, 0), (150, 150)):
        assert np.array_equal(batches.rows(first, count), whole[first : first + count])
    assert np.array_equal(build(three(paths), 300, order=order).rows(40, 60), whole[40:100])


def test_permuted_order_is_sought_far_away_and_does_not_depend_on_the_length(paths):
    far = build(three(paths), 10**15)
    start = time.perf_counter()
    rows = far.rows(10**15 - 64, 64)
    assert rows.shape == (64, S + 1) and time.perf_counter() - start < 1
    short = build(three(paths), 300)
    assert np.array_equal(far.rows(0, 300), short.rows(0, 300)) and far.fingerprint() == short.fingerprint()


def test_a_file_listed_twice_is_read_in_two_orders(paths):
    sources = [{"path": paths[1], "name": "one"}, {"path": paths[1], "name": "two"}]
    rows = build(sources, 200).rows(0, 200)
    assert not np.array_equal(rows[::2], rows[1::2])


def test_split_parts_don_t_overlap(paths):
    parts = [{"path": paths[1], "split": "8,1,1", "part": part, "name": part} for part in ("train", "valid", "test")]
    seen = [set(build([part], 13).rows(0, 13).ravel().tolist()) for part in parts]
    assert not seen[0] & seen[1] and not seen[1] & seen[2] and not seen[0] & seen[2]


def test_fingerprint_covers_all_that_decides_the_order(paths, tmp_path):
    base = build(three(paths), 300)
    assert base.fingerprint() == build(three(paths), 300).fingerprint()
    moved = [write(tmp_path / f"moved{i}", 1000 * i, tokens) for i, tokens in enumerate([401, 805, 97])]
    assert build(three(moved), 300).fingerprint() == base.fingerprint()
    changed = three(paths)
    changed[0] = changed[0] | {"weight": 0.6}
    other_data = three(paths)
    other_data[2] = other_data[2] | {"path": write(tmp_path / "other", 2001, 97)}
    variants = [
        build(three(paths), 300, seed=5),
        build(three(paths), 300, order="neox"),
        build(three(paths), 300, order="megatron"),
        build(three(paths), 3000, order="neox"),  # more epochs: another order
        build(three(paths)[::-1], 300),
        build(changed, 300),
        build(other_data, 300),
        build(three(paths, split="9,1"), 300),
        build(three(paths)[:2], 300),
    ]
    assert len({made.fingerprint() for made in [base, *variants]}) == len(variants) + 1
    scaled = [source | {"weight": 10 * source["weight"]} for source in three(paths)]
    assert build(scaled, 300).fingerprint() == base.fingerprint()


@pytest.mark.parametrize("order", ORDERS)
def test_a_source_that_is_too_small_is_refused_before_training(paths, order):
    # a holds 100 windows and gives half of the samples.
    fits = three(paths)
    fits[0] = fits[0] | {"max_epochs": 1}
    assert build(fits, 200, order=order).rows(199, 1).shape == (1, S + 1)
    with pytest.raises(
        UserError,
        match=r"source 'a' gives 100 samples \(400 tokens\) in max_epochs 1, the run needs 101 \(404 tokens\): set its "
        r"max_epochs to 1\.01 or more.*training\.budget",
    ):
        build(fits, 202, order=order)
    half = three(paths)
    half[0] = half[0] | {"max_epochs": 0.5}
    with pytest.raises(UserError, match="gives 50 samples"):
        build(half, 102, order=order)


def test_samples_past_the_end_are_refused(paths):
    batches = build(three(paths), 300)
    for first, count in ((300, 1), (290, 11), (-1, 2)):
        with pytest.raises(UserError, match=r"data end at 300: raise training\.budget"):
            batches.rows(first, count)
    with pytest.raises(UserError):
        batches.share(290, 12, 0, 3)
    for batch, rank, world in ((10, 0, 3), (12, 3, 3), (12, -1, 3)):
        with pytest.raises(ValueError, match="no share"):
            batches.share(0, batch, rank, world)


def test_ids_outside_of_the_vocabulary(paths, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"b\.bin: token 500 is id 1500, outside.*of 1500 ids"):
        build(three(paths), 300, vocab_size=1500)
    # As in a file too large to be scanned at the start: the batch that holds the id names it.
    monkeypatch.setattr("megarewarm.data.files.token_file.TokenFile.check_vocabulary", lambda self, vocab_size: None)
    batches = build(three(paths), 300, vocab_size=1500)
    with pytest.raises(UserError, match=r"b\.bin: sample \d+ of source 'b' holds id 1[5-9]\d\d"):
        batches.rows(0, 300)
    negative = tmp_path / "negative.bin"
    negative.write_bytes(np.full(100, -1, np.int32).tobytes())
    with pytest.raises(UserError, match="holds id -1"):
        build([{"path": str(negative), "dtype": "int32"}], 5).rows(0, 5)


def test_names(paths):
    assert build([{"path": paths[0] + ".bin"}, {"path": paths[1], "name": "new"}], 20).names == ["a", "new"]
    with pytest.raises(UserError, match="two sources are named 'a'"):
        build([{"path": paths[0]}, {"path": paths[0] + ".idx"}], 20)


def test_what_files_are_known_by(paths):
    (file,) = build([{"path": paths[0], "max_epochs": 1.5}], 20).files
    opened = open_tokens(paths[0])
    assert (file.path, file.fingerprint) == (paths[0] + ".bin", opened.fingerprint())
    ids = Path(paths[0] + ".bin").read_bytes()
    assert file.checksum == f"{zlib.crc32(ids, zlib.crc32(opened.sizes.tobytes())):08x}" and file.sha256 is None


def test_sources_without_samples_and_bare_files_with_split(paths, tmp_path):
    with pytest.raises(UserError, match="gives 0 tokens"):
        build([{"path": paths[0], "split": "1,0,0", "part": "valid"}], 20)
    bare = tmp_path / "bare.bin"
    bare.write_bytes(bytes(200))
    assert build([{"path": str(bare)}], 20).rows(0, 1).tolist() == [[0] * (S + 1)]
    with pytest.raises(UserError, match=r"bare\.bin has no \.idx, so no documents to split"):
        build([{"path": str(bare), "split": "9,1"}], 20)


@pytest.fixture
def working() -> Callable[[], set[threading.Thread]]:
    """The prefetching threads of this test that are still at work; another test's run may have left some."""
    before = set(threading.enumerate())
    return lambda: {thread for thread in threading.enumerate() if thread.name == "prefetch"} - before


def test_prefetch_gives_all_items_in_order_and_ends(working):
    prefetch = Prefetch((i * i for i in range(100)), depth=3)
    assert list(prefetch) == [i * i for i in range(100)]
    assert list(prefetch) == [] and not working()
    assert list(Prefetch([])) == []


def test_prefetch_works_ahead_but_not_further_than_its_depth(working):
    made = []
    reached = threading.Event()

    def items():
        for i in range(50):
            made.append(i)
            if i == 3:
                reached.set()
            yield i

    with Prefetch(items(), depth=2) as prefetch:
        assert next(prefetch) == 0
        assert reached.wait(5)  # one taken, two queued, one in hand
        time.sleep(0.05)
        assert made == [0, 1, 2, 3]
    assert not working()


def test_prefetch_forwards_the_error_after_the_items_before_it(working):
    def items():
        yield 1
        raise UserError("no more")

    prefetch = Prefetch(items())
    assert next(prefetch) == 1
    with pytest.raises(UserError, match="no more"):
        next(prefetch)
    with pytest.raises(StopIteration):
        next(prefetch)
    assert not working()


def test_prefetch_closes_while_its_queue_is_full_or_it_is_busy(working):
    busy = threading.Event()

    def endless():
        while True:
            busy.set()
            yield 0

    for wait in (False, True):
        prefetch = Prefetch(endless(), depth=1)
        if wait:
            assert busy.wait(5)
            time.sleep(0.02)
        start = time.perf_counter()
        prefetch.close()
        prefetch.close()
        assert time.perf_counter() - start < 2 and not working()
        with pytest.raises(StopIteration):
            next(prefetch)
