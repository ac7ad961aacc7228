"""Token files, sample orders and blends against megatron-core itself, the package of NVIDIA's that is on PyPI."""

from __future__ import annotations

import functools
import logging
import math
import operator
import types
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.config.data import DataConfig
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.files.merge import merge_token_files
from megarewarm.data.files.split import PARTS, split_documents
from megarewarm.data.files.token_file import TokenFileWriter, open_tokens
from megarewarm.data.mixture.batches import build_training_batches
from megarewarm.data.mixture.blend import greedy_blend, normalised
from megarewarm.data.mixture.mixture import _wanted
from megarewarm.data.mixture.phases import Phase
from megarewarm.data.order.samples import MegatronSamples
from megarewarm.errors import UserError
from megarewarm.rewarm.replay import with_replay


class NoTokenizer:
    """What GPTDataset asks of a tokenizer. Pad and end of document are ids that stand in no text here."""

    vocab_size = 70_000
    pad, eod, eos = -1, -2, -2
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012


@pytest.fixture(scope="session")
def megatron() -> types.SimpleNamespace:
    """megatron-core's modules of data sets."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed: pip install megatron-core")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for apex and for Transformer Engine
        names = ["indexed_dataset", "gpt_dataset", "blended_megatron_dataset_builder", "utils", "helpers_cpp"]
        names.append("blended_megatron_dataset_config")
        return types.SimpleNamespace(**{name: import_module(f"megatron.core.datasets.{name}") for name in names})


def write_theirs(megatron, prefix: Path, documents: list[list[list[int]]], dtype: type, *, multimodal: bool = False) -> None:
    """Documents of sequences, by megatron-core."""
    builder = megatron.indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=multimodal)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def write_ours(prefix: Path, sizes: list[int], first: int = 0, dtype: type = np.int32) -> str:
    """Documents of those sizes, whose tokens count up from ``first``."""
    with TokenFileWriter(prefix, dtype) as writer:
        for size in sizes:
            writer.add_document(np.arange(first, first + size))
            first += size
    return str(prefix)


def configuration(megatron, s: int, seed: int, **more: object):
    return megatron.gpt_dataset.GPTDatasetConfig(
        random_seed=seed,
        sequence_length=s,
        tokenizer=NoTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        **more,
    )


def text(samples) -> np.ndarray:
    """Every sample of one of their data sets, (samples, s + 1)."""
    items = [samples[i] for i in range(len(samples))]
    return np.stack([np.append(item["tokens"].numpy(), int(item["labels"][-1])) for item in items])


sequences = st.lists(st.integers(0, 2**16 - 1), max_size=6)


@settings(max_examples=40, deadline=None)
@given(documents=st.lists(st.lists(sequences, max_size=3), max_size=6), wide=st.booleans(), multimodal=st.booleans())
def test_we_read_what_they_write(tmp_path_factory, megatron, documents, wide, multimodal):
    prefix = tmp_path_factory.mktemp("theirs") / "x"
    dtype = np.int32 if wide else np.uint16
    write_theirs(megatron, prefix, documents, dtype, multimodal=multimodal)
    file = open_tokens(prefix)
    assert file.dtype == dtype
    every = [sequence for document in documents for sequence in document]
    assert [file.document(i).tolist() for i in range(file.num_documents)] == every


@settings(max_examples=40, deadline=None)
@given(documents=st.lists(sequences, max_size=12), wide=st.booleans())
def test_they_read_what_we_write(tmp_path_factory, megatron, documents, wide):
    prefix = tmp_path_factory.mktemp("ours") / "x"
    with TokenFileWriter(prefix, np.int32 if wide else np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
    if not any(documents):
        return  # they map the .bin, and an empty file can't be mapped
    theirs = megatron.indexed_dataset.IndexedDataset(str(prefix))
    assert theirs.index.dtype == (np.int32 if wide else np.uint16)
    assert [theirs[i].tolist() for i in range(len(theirs))] == documents
    assert theirs.document_indices.tolist() == list(range(len(documents) + 1))


def test_merged_files_are_the_same_bytes(tmp_path, megatron):
    parts: dict[str, list[list[list[int]]]] = {"a": [[[1, 2]], [[3]]], "b": [[[4, 5, 6]], [[]], [[7]]]}
    for name, documents in parts.items():
        write_theirs(megatron, tmp_path / name, documents, np.uint16)
    merge_token_files([tmp_path / "a", tmp_path / "b"], tmp_path / "ours")
    builder = megatron.indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for name in "ab":
        builder.add_index(str(tmp_path / name))
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_their_floats_are_refused_by_either_code(tmp_path, megatron, dtype):
    write_theirs(megatron, tmp_path / "x", [[[1, 2]]], dtype)
    with pytest.raises(UserError, match=r"floating-point numbers \(dtype code [67]\)"):
        open_tokens(tmp_path / "x")


def test_images_between_the_text_are_refused(tmp_path, megatron):
    builder = megatron.indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.int32, multimodal=True)
    for mode in (0, 1):
        builder.add_item(torch.tensor([1, 2, 3]), mode=mode)
        builder.end_document()
    builder.finalize(str(tmp_path / "x.idx"))
    with pytest.raises(UserError, match="sequence 1 is of mode 1, expected 0"):
        open_tokens(tmp_path / "x")


def test_a_file_without_document_index_which_they_refuse(tmp_path, megatron, caplog):
    write_theirs(megatron, tmp_path / "x", [[[1, 2]], [[3]]], np.uint16)
    with megatron.indexed_dataset._IndexWriter(str(tmp_path / "x.idx"), np.uint16) as writer:
        writer.write([2, 1], None, [0])
    with pytest.raises(AssertionError):
        megatron.indexed_dataset.IndexedDataset(str(tmp_path / "x"))
    with caplog.at_level(logging.WARNING):
        file = open_tokens(tmp_path / "x")
    assert "has no document index" in caplog.text
    assert [file.document(i).tolist() for i in range(2)] == [[1, 2], [3]]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 20), min_size=3, max_size=30),
    s=st.integers(1, 8),
    epochs=st.floats(0.01, 4.5),
    seed=st.integers(0, 2**32 - 1),
    split=st.sampled_from(["1", "969,30,1", "70,20,10", "1,1,1"]),
    part=st.sampled_from(PARTS),
)
def test_order_of_one_file_is_theirs(tmp_path_factory, megatron, sizes, s, epochs, seed, split, part):
    prefix = write_ours(tmp_path_factory.mktemp("one") / "x", sizes, first=1)
    file = open_tokens(prefix)
    view = file.view(*split_documents(split, file.num_documents, "megatron")[part])
    if view.num_tokens < s + 1:
        return  # a sample of theirs would then be filled up with padding; ours is refused, see test_data_samples
    requested = max(1, int(epochs * ((view.num_tokens - 1) // s)))
    config = configuration(megatron, s, seed, blend=([prefix], None), split=split)
    numbers = [requested if name == part else 0 for name in PARTS]
    builder = megatron.blended_megatron_dataset_builder.BlendedMegatronDatasetBuilder
    kind = megatron.gpt_dataset.GPTDataset
    indices = np.arange(view.first_document, view.last_document, dtype=np.int32)
    theirs = kind(
        kind.build_low_level_dataset(prefix, config),
        prefix,
        indices,
        requested,
        getattr(megatron.utils.Split, part),
        config,
    )
    ours = MegatronSamples(view, s, seed, requested)
    assert ours.num_samples == len(theirs)
    assert np.array_equal(ours.document_order, theirs.document_index)
    assert np.array_equal(ours.shuffle, theirs.shuffle_index)
    out = np.empty((len(theirs), s + 1), np.int64)
    ours.fill(np.arange(len(theirs)), out)
    assert np.array_equal(out, text(theirs))
    parts = [file.view(first, last) for first, last in split_documents(split, file.num_documents, "megatron").values()]
    if all(view.num_tokens > s for view in parts):  # of a part without tokens theirs counts epochs for ever
        built = builder(kind, numbers, lambda: True, config).build()[PARTS.index(part)]
        assert np.array_equal(built.document_index, ours.document_order)  # so the split is theirs as well


@pytest.mark.parametrize("needed", [0.5, 0.79, 0.8, 0.81, 1.0, 1.5, 1.79, 1.81, 3.2])
def test_last_epoch_is_apart_when_theirs_is(tmp_path, megatron, needed):
    prefix = write_ours(tmp_path / "x", [37, 12, 0, 55, 96] * 5, first=1)
    view = open_tokens(prefix).view()
    requested = int(needed * ((view.num_tokens - 1) // 4))
    config = configuration(megatron, 4, 7, blend=([prefix], None), split="1")
    theirs = megatron.blended_megatron_dataset_builder.BlendedMegatronDatasetBuilder(
        megatron.gpt_dataset.GPTDataset, [requested, 0, 0], lambda: True, config
    ).build()[0]
    ours = MegatronSamples(view, 4, 7, requested)
    assert len(ours.epoch_ranges) == (2 if needed in (1.5, 1.79, 3.2) else 1)
    out = np.empty((len(theirs), 5), np.int64)
    ours.fill(np.arange(len(theirs)), out)
    assert np.array_equal(out, text(theirs))


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.integers(1, 1000).map(lambda n: n / 1000), min_size=2, max_size=3),
    total=st.integers(30, 400),
    s=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    split=st.sampled_from(["1", "900,50,50", "80,20"]),
)
def test_blends_of_parts_of_files_are_theirs(tmp_path_factory, megatron, weights, total, s, seed, split):
    folder = tmp_path_factory.mktemp("blend")
    random = np.random.default_rng(seed)
    paths = [
        write_ours(folder / name, random.integers(1, 12, 60).tolist(), 1000 * (i + 1))
        for i, name in zip(range(len(weights)), "abc", strict=False)
    ]
    config = configuration(megatron, s, seed, blend=(paths, weights), split=split)
    build = megatron.blended_megatron_dataset_builder.BlendedMegatronDatasetBuilder(
        megatron.gpt_dataset.GPTDataset, [total, 0, 0], lambda: True, config
    ).build
    sources = [
        {"path": path, "weight": weight, "split": split, "max_epochs": None}
        for path, weight in zip(paths, weights, strict=True)
    ]
    data = DataConfig(sequence_length=s, order="megatron", seed=seed, train=sources)
    rows = build_training_batches(
        TokenFiles(data, 2**31), [Phase(0, with_replay(data.train, [], 0, data.order_name))], total_samples=total
    ).rows(0, total)
    assert np.array_equal(rows, text(build()[0])[:total])


def decimal_weights(random: np.random.Generator) -> list[float]:
    """Weights as people write them, often equal ones, which tie."""
    count, digits = int(random.integers(1, 41)), int(random.choice([1, 2, 3, 6]))
    weights = np.maximum(random.random(count), 10.0**-digits).round(digits)
    return (np.full(count, weights[0]) if random.random() < 0.3 else weights).tolist()


def their_picks(megatron, shares: list[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    source, index = np.zeros(size, np.int16), np.zeros(size, np.int64)
    megatron.helpers_cpp.build_blending_indices(source, index, np.array(shares), len(shares), size, False)
    return source, index


def test_decimal_weights_tie_as_theirs(megatron):
    """Both trainers use this one rule; they add up the weights differently, and each divides twice."""
    equal: Any = np.array_equal
    random, apart = np.random.default_rng(0), 0
    for _ in range(1500):
        weights = decimal_weights(random)
        shares = megatron.utils.normalize(weights)
        theirs = their_picks(megatron, megatron.utils.normalize(shares), 300)
        ours = normalised(weights, "megatron")
        assert ours == shares
        assert all(map(equal, greedy_blend(ours, 300), theirs)), weights
        total = functools.reduce(operator.add, weights)  # GPT-NeoX's get_normalized_weights_and_num_samples ...
        once = np.array([weight / total for weight in weights])
        neox = their_picks(megatron, (once / np.sum(once)).tolist(), 300)  # ... and its BlendableDataset
        assert all(map(equal, greedy_blend(normalised(weights, "neox"), 300), neox)), weights
        apart += not np.array_equal(theirs[0], neox[0])
    assert apart > 50  # or the difference between the two would not have been tried


def test_samples_asked_of_each_source_are_theirs(megatron):
    random = np.random.default_rng(1)
    sizes = megatron.blended_megatron_dataset_builder._get_size_per_split_per_dataset
    for _ in range(1500):
        weights, total = decimal_weights(random), int(random.integers(1, 10**7))
        sources = [{"path": f"x{i}", "weight": weight, "max_epochs": None} for i, weight in enumerate(weights)]
        for order in ("megatron", "neox"):
            data = DataConfig(sequence_length=8, order=order, train=sources, blend_of_one=True)
            phase = Phase(0, with_replay(data.train, [], 0, data.order_name))
            found = _wanted(data, [phase], [total], [np.arange(len(weights))], len(weights))
            if order == "megatron":
                theirs = [size for size, _, _ in sizes(megatron.utils.normalize(weights), [total, 0, 0], surplus=0.005)]
            else:
                added = functools.reduce(operator.add, weights)
                theirs = [math.ceil(total * (weight / added) * 1.005) for weight in weights]
            assert found == theirs, (order, weights, total)


@settings(max_examples=300, deadline=None)
@given(
    shares=st.lists(st.one_of(st.integers(0, 1000), st.integers(0, 10**6).map(lambda n: n / 1000)), min_size=1, max_size=3),
    documents=st.integers(0, 10**8),
)
def test_splits_of_any_shares_are_theirs(megatron, shares, documents):
    if not sum(shares):
        return
    split = ",".join(map(str, shares))
    config = megatron.blended_megatron_dataset_config
    matrix = config.convert_split_vector_to_split_matrix(config.parse_and_normalize_split(split))
    theirs = [tuple(round(edge * float(documents)) for edge in edges) if edges else None for edges in matrix]
    for part, found, expected in zip(PARTS, split_documents(split, documents, "megatron").values(), theirs, strict=True):
        assert found == expected or (expected is None and found[0] == found[1]), (part, split)
