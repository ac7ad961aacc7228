"""Best-fit packing: what holds for any documents, a packing by the book, and runs that train on it."""

from __future__ import annotations

import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.checkpoint.source import OwnCheckpoint
from megarewarm.config.model import ModelConfig
from megarewarm.config.schema import RunConfig
from megarewarm.data.files.document_table import DocumentTable, read_table, used, write_table
from megarewarm.data.files.listed_documents import listed
from megarewarm.data.files.token_file import TokenFileWriter, open_tokens
from megarewarm.data.order import packed_samples
from megarewarm.data.order.packed_samples import PackedSamples
from megarewarm.data.order.packing import best_fit
from megarewarm.data.order.seen_samples import reopen
from megarewarm.errors import UserError
from megarewarm.model.documents import IGNORE, DocumentRules
from megarewarm.model.transformer import Transformer
from megarewarm.packed_rows import PAD, begun, plain
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.trainer import train
from tests.support.distributed import run_ranks
from tests.support.tiny import config, events, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))


def by_the_book(sizes: list[int], room: int) -> list[int]:
    """The room that is left in each row, ascending, after best-fit decreasing item by item."""
    left: list[int] = []
    for size in sorted(sizes, reverse=True):
        able = [i for i, each in enumerate(left) if each >= size]
        if able:
            left[min(able, key=lambda i: left[i])] -= size
        else:
            left.append(room - size)
    return sorted(left)


@given(st.integers(1, 12).flatmap(lambda room: st.tuples(st.just(room), st.lists(st.integers(1, room), max_size=60))))
def test_best_fit_is_the_one_by_the_book(case: tuple[int, list[int]]) -> None:
    room, sizes = case
    row_of, rows = best_fit(np.array(sizes, np.int64), room)
    filled = np.bincount(row_of, weights=sizes, minlength=rows) if sizes else np.zeros(0)
    assert sorted((room - filled).astype(int).tolist()) == by_the_book(sizes, room)


def written(place: Path, sizes: list[int]) -> Any:
    """A file whose tokens are all different: document and place can be told from an id."""
    with TokenFileWriter(place / "docs", np.int32) as writer:
        start = 0
        for size in sizes:
            writer.add_document(np.arange(start, start + size))
            start += size
    return open_tokens(place / "docs")


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda sizes: max(sizes) > 1),
    st.integers(1, 12),
    st.booleans(),
    st.sampled_from([3, 99]),
)
def test_every_token_once_an_epoch_no_row_too_long_no_document_in_two_rows(
    sizes: list[int], length: int, shuffled: bool, block: int
) -> None:
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patched:
        patched.setattr(packed_samples, "_BLOCK", block)  # documents that are packed together
        view = written(Path(place), sizes).view()
        samples = PackedSamples(view, length, 5 if shuffled else None, 2.0)
        room, rows = length + 1, samples.samples_per_epoch
        out = np.empty((2 * rows, room), np.int64)
        samples.fill(np.arange(2 * rows), out)
        bounds = np.cumsum([0, *sizes])
        for epoch in (out[:rows], out[rows:]):
            assert sorted(plain(epoch[epoch != PAD]).tolist()) == list(range(sum(sizes)))  # each token once
            parts: Counter[int] = Counter()
            for row in epoch:
                held = row[row != PAD]
                assert len(held) and (row[len(held) :] == PAD).all() and held[0] < 0  # padding at the end only
                ids, begins = plain(held), np.flatnonzero(held < 0)
                for first, last in zip(begins, [*begins[1:], len(held)], strict=True):
                    piece = ids[first:last]
                    assert (np.diff(piece) == 1).all()
                    document = int(np.searchsorted(bounds, piece[0], side="right")) - 1
                    assert piece[-1] < bounds[document + 1] and (piece[0] - bounds[document]) % room == 0
                    assert (piece[0] == bounds[document]) or sizes[document] > room  # only a long one is cut
                    parts[document] += 1
            assert all(parts[i] == -(-size // room) for i, size in enumerate(sizes) if size)  # whole rows and a rest
        told = samples.packing
        assert told.cut == sum(size > room for size in sizes)
        windows = [set(range(first, first + room)) for first in range(0, sum(sizes), length)]
        stream = sum(not any(set(range(a, b)) <= window for window in windows) for a, b in pairwise(bounds))
        assert told.cut_in_stream == stream and told.padding == pytest.approx(1 - sum(sizes) / (rows * room))
        starts, lengths = samples.pieces(np.arange(rows))
        assert int(lengths.sum()) == sum(sizes) and len(np.unique(starts)) == len(starts)


def test_rows_without_anything_to_predict_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"docs.*: no document has two tokens, .* remove data.pack"):
        PackedSamples(written(tmp_path, [1, 0, 1, 1]).view(), 4, None)


def test_a_row_read_alone_is_the_row_read_among_others_and_an_order_is_kept_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = np.random.default_rng(1).integers(0, 50, 300).tolist()
    view = written(tmp_path, sizes).view(20, 280)
    one = PackedSamples(view, 16, 7)
    monkeypatch.setattr(packed_samples, "CACHED", 1)
    monkeypatch.setenv("MEGAREWARM_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        other = PackedSamples(view, 16, 7)
        some = np.random.default_rng(2).integers(0, one.samples_per_epoch, 20)
        out = np.empty((20, 17), np.int64)
        other.fill(some, out)
        assert all((row == one.sample(int(i))).all() for row, i in zip(out, some, strict=True))
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1
    with pytest.raises(IndexError):
        one.sample(one.samples_per_epoch)


def test_a_range_or_a_list_of_documents_is_packed_alone(tmp_path: Path) -> None:
    file = written(tmp_path, [5, 9, 3, 30, 4])
    path = tmp_path / "list.safetensors"
    write_table(path, DocumentTable("list", np.array([1, 3, 4])), file)
    table = read_table(str(path), "list", file)
    for view, ids in (
        (file.view(1, 4), range(5, 47)),
        (listed(file, table, used(str(path), table)), [*range(5, 14), *range(17, 51)]),
    ):
        samples = PackedSamples(view, 9, None)
        out = np.empty((samples.samples_per_epoch, 10), np.int64)
        samples.fill(np.arange(len(out)), out)
        assert sorted(plain(out[out != PAD]).tolist()) == list(ids)
        assert reopen(samples.sample_order(), file).sample(0).tolist() == out[0].tolist()


def test_the_loss_of_a_packed_row_is_that_of_its_documents_alone() -> None:
    """Against the model on each document by itself, in float64: no attention, position or target crosses a border."""
    made = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "vocab_size": 64, "max_positions": 32}
    torch.manual_seed(0)
    model = Transformer(ModelConfig.model_validate(made)).double()
    documents = [torch.randint(0, 64, (n,)) for n in (7, 1, 9, 4)]
    row = torch.cat([*[torch.cat([begun(d[:1]), d[1:]]) for d in documents], torch.full((3,), PAD)])[None]
    rules = DocumentRules(IGNORE, reset=False, mask_loss=False, packed=True)
    inputs, targets = row[:, :-1], row[:, 1:]
    hidden = model(rules.ids(inputs), rules.starts(inputs))
    wanted = rules.targets(inputs, targets)
    assert int((wanted != IGNORE).sum()) == sum(len(d) - 1 for d in documents)
    logits = torch.nn.functional.linear(hidden, model.head)
    found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
    alone = [
        torch.nn.functional.cross_entropy(model.logits(d[None, :-1])[0], d[1:], reduction="sum")
        for d in documents
        if len(d) > 1
    ]
    assert float(found) == pytest.approx(float(sum(alone)), rel=1e-12)
    # without marks a row is one document
    assert rules.starts(row.abs()).sum() == 0 and (rules.ids(row.abs()) == row.abs()).all()  # type: ignore[union-attr]


def packed(place: Path, name: str, **changes: Any) -> RunConfig:
    data = {"pack": "best_fit"} | changes.pop("data", {})
    return config(
        place,
        **{
            "name": name,
            "folder": str(place / name),
            "data": data,
            "training": {"budget": 6, "global_batch": 8, "micro_batch": 4},
            "evaluation": {"every": 3},
            "checkpoint": {"every": 3, "keep_last": 9},
        }
        | changes,
    )


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in events(folder, "train")]


def test_a_run_on_packed_rows_says_what_packing_costs_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = train(packed(tmp_path, "whole"), ALONE, quiet()).folder
    (note,) = (note for note in events(whole, "start")[0]["notes"] if note.startswith("data.pack"))
    assert "40 documents in" in note and "of their places padding, without loss" in note and "the stream would cut" in note
    train(packed(tmp_path, "parts", training={"budget": 6, "global_batch": 8, "micro_batch": 2}), ALONE, quiet())
    assert losses(tmp_path / "parts") == pytest.approx(losses(whole), rel=1e-5)  # other micro-batches, one mean over targets
    stopped = packed(tmp_path, "stopped")
    train(stopped, ALONE, quiet())
    for path in (tmp_path / "stopped/checkpoints").iterdir():
        if path.name == "step_6":
            for file in sorted(path.rglob("*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()
            path.rmdir()
    train(stopped, ALONE, quiet())
    assert losses(tmp_path / "stopped")[-3:] == losses(whole)[-3:]
    one, other = (OwnCheckpoint(tmp_path / name / "checkpoints/step_6") for name in ("whole", "stopped"))
    assert one.training is not None and other.training is not None
    assert one.training.data_fingerprint == other.training.data_fingerprint


def test_packed_rows_are_replayed_out_of_the_lineage(tmp_path: Path) -> None:
    first = train(packed(tmp_path, "first"), ALONE, quiet()).folder
    again = {"start": {"from": str(first), "intent": "rewarm"}, "replay": {"of": "lineage", "fraction": 0.5, "max_epochs": 9}}
    train(packed(tmp_path, "second", **again), ALONE, quiet())
    assert len(losses(tmp_path / "second")) == 6
    with pytest.raises(UserError, match=r"was read in rows of whole documents, which this run does not read"):
        train(packed(tmp_path, "third", **again, data={"pack": None}), ALONE, quiet())


def _trained(ranks: Ranks, place: Path, name: str, changes: dict[str, Any]) -> None:
    sources = [{"path": str(place / name), "max_epochs": 9, "weight": weight} for name, weight in (("new", 2), ("old", 1))]
    train(packed(place, name, model={"num_layers": 4}, data={"train": sources}, **changes), ranks, quiet())


@pytest.mark.parametrize(
    "parallel",
    [
        {"pipeline": 2},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"tensor": 2, "sequence": True}, marks=pytest.mark.slow),
        pytest.param({"sharding": "zero3"}, marks=pytest.mark.slow),
        pytest.param({"pipeline": 2, "schedule": "zero_bubble"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_layout_trains_on_the_same_packed_rows(tmp_path: Path, parallel: dict[str, Any]) -> None:
    _trained(ALONE, tmp_path, "alone", {})
    run_ranks(
        _trained, 2, tmp_path, "two", {"parallel": parallel, "training": {"budget": 6, "global_batch": 8, "micro_batch": 2}}
    )
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "alone"), rel=2e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"order": "megatron"}}, "pack: order 'megatron' is of windows"),
        ({"data": {"order": {"by": "loss"}}}, "pack: an order by scores is of windows"),
        ({"evaluation": {"windows": "moving", "at_start": False, "every": 3}}, "data.pack has none"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        packed(tmp_path, "no", **changes)
