"""Sample orders: GPT-NeoX's and Megatron-LM's against recorded indices and a walk by tokens; the permuted one."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.data.files.split import Part, split_documents
from megarewarm.data.files.token_file import TokenFile, TokenFileWriter, open_tokens
from megarewarm.data.order.samples import MegatronSamples, NeoxSamples, PermutedSamples
from megarewarm.errors import UserError


def numbered_tokens(folder: Path, sizes: list[int]) -> TokenFile:
    """A file whose token at flat position i is i."""
    start = 0
    with TokenFileWriter(folder / "x", np.int32) as writer:
        for size in sizes:
            writer.add_document(np.arange(start, start + size))
            start += size
    return open_tokens(folder / "x")


GOLDEN_SIZES = [5, 1, 7, 0, 3, 9]
# (class, requested samples): document order, sample starts, shuffle; from the compiled helpers of both trainers
GOLDEN = {
    (NeoxSamples, 6): (
        [2, 1, 5, 0, 4, 3],
        [(0, 0), (0, 4), (2, 0), (2, 4), (2, 8), (3, 3), (4, 2)],
        [0, 4, 3, 2, 5, 1],
    ),
    (NeoxSamples, 8): (
        [1, 2, 5, 2, 3, 4, 1, 0, 4, 5, 0, 3],
        [(0, 0), (1, 3), (2, 0), (2, 4), (2, 8), (3, 3), (5, 0), (7, 0), (7, 4), (9, 0), (9, 4), (9, 8), (10, 3)],
        [7, 11, 2, 3, 1, 9, 5, 4, 0, 8, 6, 10],
    ),
    (MegatronSamples, 6): (
        [2, 1, 5, 0, 4, 3],
        [(0, 0), (0, 4), (2, 0), (2, 4), (2, 8), (3, 3), (4, 2)],
        [0, 4, 3, 2, 5, 1],
    ),
    (MegatronSamples, 8): (
        [2, 1, 5, 0, 4, 3, 0, 4, 3, 2, 5, 1],
        [(0, 0), (0, 4), (2, 0), (2, 4), (2, 8), (3, 3), (4, 2), (6, 3), (7, 2), (9, 3), (10, 0), (10, 4), (10, 8)],
        [1, 0, 3, 2, 5, 4, 8, 9, 7, 10, 11, 6],
    ),
}


@pytest.mark.parametrize(("kind", "requested"), GOLDEN)
def test_orders_of_the_compiled_helpers(tmp_path, kind, requested):
    documents, starts, shuffle = GOLDEN[kind, requested]
    samples = kind(numbered_tokens(tmp_path, GOLDEN_SIZES).view(), 4, 1234, requested)
    assert samples.document_order.tolist() == documents
    assert samples.starts(np.arange(samples.num_samples + 1)).tolist() == [list(start) for start in starts]
    assert samples.shuffle.tolist() == shuffle
    assert (samples.samples_per_epoch, samples.num_samples) == (6, len(shuffle))
    assert samples.num_epochs == (1 if requested == 6 else 2)


def test_recorded_index_maps_of_gpt_neox(golden):
    found = sorted((golden / "indexmaps").glob("*_doc_idx.npy"))
    assert len(found) == 6
    for path in found:
        found_name = re.match(r"(.*)_(train|valid|test)_indexmap_(\d+)ns_64sl_1234s", path.name)
        assert found_name
        name, part, requested = found_name.groups()
        file = open_tokens(golden / name)
        view = file.view(*split_documents("900,50,50", file.num_documents)[cast(Part, part)])
        samples = NeoxSamples(view, 64, 1234, int(requested))
        maps = {key: np.load(str(path).replace("doc_idx", f"{key}_idx")) for key in ("doc", "sample", "shuffle")}
        assert np.array_equal(samples.document_order, maps["doc"])
        assert np.array_equal(samples.shuffle, maps["shuffle"]) and samples.shuffle.dtype == maps["shuffle"].dtype
        assert np.array_equal(samples.starts(np.arange(len(maps["sample"]))), maps["sample"])
        # The tokens themselves, put together from the recorded maps alone.
        for i in (0, 1, samples.num_samples - 1):
            (first, offset), (last, end) = maps["sample"][maps["shuffle"][i]], maps["sample"][maps["shuffle"][i] + 1]
            texts = [file.document(int(d)) for d in maps["doc"][first : last + 1]]
            texts[-1] = texts[-1][: end + 1]
            texts[0] = texts[0][offset:]
            assert np.array_equal(samples.sample(i), np.concatenate(texts))


def walked_starts(sizes: list[int], s: int, samples: int) -> list[tuple[int, int]]:
    """Both trainers' sample index by walking token by token, with the exact position of every sample's last token."""
    places = [(row, offset) for row, size in enumerate(sizes) for offset in range(size)]
    return [places[k * s] for k in range(samples + 1)]


sizes_of_documents = st.lists(st.integers(0, 20), min_size=1, max_size=10).filter(lambda sizes: sum(sizes) > 8)


@settings(max_examples=80, deadline=None)
@given(sizes_of_documents, st.integers(1, 7), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_shuffled_orders_against_a_walk(tmp_path_factory, sizes, s, requested, seed):
    view = numbered_tokens(tmp_path_factory.mktemp("t"), sizes).view()
    total = sum(sizes)
    epochs = 1
    while (epochs * total - 1) // s < requested:
        epochs += 1
    made = (epochs * total - 1) // s
    before = ((epochs - 1) * total - 1) // s
    separate = epochs > 1 and requested - before < int(0.80 * ((total - 1) // s))
    for kind in (NeoxSamples, MegatronSamples):
        apart = separate and kind is MegatronSamples
        random = np.random.RandomState(seed)
        parts = [(epochs - 1, before), (1, made - before)] if apart else [(epochs, made)]
        documents: list[int] = []
        for count, _ in parts:
            part = np.array(list(range(len(sizes))) * count, np.int32)
            random.shuffle(part)
            documents += part.tolist()
        order: list[int] = []
        for _, count in parts:
            part = np.arange(len(order), len(order) + count, dtype=np.uint32)
            random.shuffle(part)
            order += part.tolist()
        samples = kind(view, s, seed, requested)
        assert (samples.num_samples, samples.num_epochs) == (made, epochs)
        assert samples.document_order.tolist() == documents
        assert samples.shuffle.tolist() == order
        starts = walked_starts([sizes[d] for d in documents], s, made)
        assert samples.starts(np.arange(made + 1)).tolist() == [list(start) for start in starts]
        text = np.concatenate([view.file.document(d) for d in documents])
        out = np.empty((made, s + 1), np.int64)
        samples.fill(np.arange(made), out)
        assert np.array_equal(out, np.stack([text[k * s : k * s + s + 1] for k in order]))


@settings(max_examples=60, deadline=None)
@given(sizes_of_documents, st.integers(1, 7), st.integers(0, 1000), st.data())
def test_permuted_epochs_hold_each_window_once(tmp_path_factory, sizes, s, seed, data):
    file = numbered_tokens(tmp_path_factory.mktemp("t"), sizes)
    first = data.draw(st.integers(0, len(sizes) - 1))
    last = data.draw(st.integers(first + 1, len(sizes)))
    start, total = sum(sizes[:first]), sum(sizes[first:last])
    view = file.view(first, last)
    if total < s + 1:
        with pytest.raises(UserError, match=f"gives {total} tokens.*one sample takes {s + 1}"):
            PermutedSamples(view, s, seed)
        return
    windows = [list(range(start + w * s, start + w * s + s + 1)) for w in range((total - 1) // s)]
    samples = PermutedSamples(view, s, seed, max_epochs=2.5)
    assert samples.num_samples == math.floor(2.5 * len(windows))
    out = np.empty((samples.num_samples, s + 1), np.int64)
    samples.fill(np.arange(samples.num_samples), out)
    for epoch in range(2):
        assert sorted(out[epoch * len(windows) : (epoch + 1) * len(windows)].tolist()) == windows
    assert all(row in windows for row in out[2 * len(windows) :].tolist())
    shuffled = np.random.default_rng(0).permutation(samples.num_samples)
    again = np.empty_like(out)
    samples.fill(shuffled, again)
    assert np.array_equal(again, out[shuffled])


@pytest.mark.parametrize("kind", [NeoxSamples, MegatronSamples])
def test_part_of_a_split_stays_in_its_documents(tmp_path, kind):
    file = numbered_tokens(tmp_path, [7, 5, 0, 11, 13, 3])
    samples = kind(file.view(2, 5), 4, 1, 20)
    out = np.empty((samples.num_samples, 5), np.int64)
    samples.fill(np.arange(samples.num_samples), out)
    assert set(out.ravel().tolist()) == set(range(12, 36))
    assert set(samples.document_order.tolist()) == {2, 3, 4}


def test_permuted_order_depends_on_seed_and_epoch(tmp_path):
    view = numbered_tokens(tmp_path, [401]).view()
    every = np.arange(100)
    orders = []
    for seed, epoch in ((1, 0), (1, 1), (2, 0)):
        out = np.empty((100, 5), np.int64)
        PermutedSamples(view, 4, seed, None).fill(epoch * 100 + every, out)
        orders.append(out[:, 0].tolist())
    assert orders[0] != orders[1] and orders[0] != orders[2] and orders[1] != orders[2]


def test_limits(tmp_path):
    view = numbered_tokens(tmp_path, [41]).view()
    endless = PermutedSamples(view, 4, 0, None)
    assert endless.num_samples is None
    assert endless.sample(10**15).shape == (5,)
    limited = PermutedSamples(view, 4, 0, 1.25)
    assert limited.num_samples == 12
    assert limited.sample(11).dtype == np.int64
    for samples, bad in ((limited, 12), (limited, -1), (NeoxSamples(view, 4, 0, 10), 10), (endless, -1)):
        with pytest.raises(IndexError):
            samples.sample(bad)


def test_sources_shorter_than_one_sample(tmp_path):
    view = numbered_tokens(tmp_path, [4]).view()
    for make in (
        lambda s: PermutedSamples(view, s, 0),
        lambda s: MegatronSamples(view, s, 0, 1),
    ):
        assert make(3).samples_per_epoch == 1
        with pytest.raises(UserError, match=r"x\.bin gives 4 tokens.*takes 5: shorten data\.sequence_length"):
            make(4)


def test_gpt_neox_makes_a_sample_of_several_epochs_of_a_short_source(tmp_path):
    samples = NeoxSamples(numbered_tokens(tmp_path, [4]).view(), 6, 0, 1)
    assert samples.num_epochs == 2 and samples.samples_per_epoch == 0
    assert samples.sample(0).tolist() == [0, 1, 2, 3, 0, 1, 2]
