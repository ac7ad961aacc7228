"""What every layout saves, goes on from and evaluates is the run of one process, with sizes that divide nothing.

Whole tensors and moments are read by torch's own reader of checkpoints and compared with those of one process.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from megarewarm.checkpoint.own.misplaced_rows import true_places
from megarewarm.checkpoint.own.slices import tile
from megarewarm.checkpoint.own.store import load, misplaced_rows, stored_tensors
from megarewarm.config.model import ModelConfig
from megarewarm.model.parameters import cards
from megarewarm.parallel.placement import TensorSlice, place
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.setup import build
from megarewarm.training.start.plan import make_plan
from megarewarm.training.trainer import train
from tests.checkpoint.test_layouts import tensors_of
from tests.support.distributed import run_ranks
from tests.support.tiny import config, events, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))
# 69 rows over 2 tensor ranks are 35 and 34, over 2 shards 18 and 17, or 17 and 17; no other size divides evenly either
MODEL = {"hidden_size": 20, "num_heads": 2, "ffn_size": 26, "vocab_size": 69, "rotary_fraction": 0.4}

# ranks, parallel, model, training: every pair of kinds of parallelism at least once
Case = tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]
CASES: dict[str, Case] = {
    "tensor_zero2": (4, {"tensor": 2, "sharding": "zero2"}, {"num_layers": 2}, {"micro_batch": 3}),
    "tensor_zero3_sequence": (4, {"tensor": 2, "sequence": True, "sharding": "zero3"}, {"num_layers": 2}, {"micro_batch": 4}),
    "zero_bubble_zero2_tied": (
        4,
        {"pipeline": 2, "schedule": "zero_bubble", "sharding": "zero2"},
        {"num_layers": 5, "tie_embeddings": True},
        {"micro_batch": 5},
    ),
}
SLOW: dict[str, Case] = {
    "few_micro_batches_zero2": (4, {"pipeline": 2, "sharding": "zero2"}, {"num_layers": 3}, {"micro_batch": 5}),
    "tensor_zero2_tied": (4, {"tensor": 2, "sharding": "zero2"}, {"num_layers": 2, "tie_embeddings": True}, {"micro_batch": 2}),
    "three_shards": (6, {"tensor": 2, "sharding": "zero3"}, {"num_layers": 2}, {"global_batch": 9, "micro_batch": 2}),
    "hybrid_of_one": (4, {"sharding": "zero2", "shard_ranks": 1}, {"num_layers": 2}, {"global_batch": 12, "micro_batch": 2}),
    "tensor_1f1b_zero2": (8, {"tensor": 2, "pipeline": 2, "sharding": "zero2"}, {"num_layers": 3}, {"micro_batch": 2}),
    "tensor_sequence_interleaved_tied": (
        8,
        {"tensor": 2, "sequence": True, "pipeline": 2, "schedule": "interleaved", "sharding": "zero2"},
        {"num_layers": 5, "tie_embeddings": True},
        {"micro_batch": 1},
    ),
    "tensor_zero_bubble_tied": (
        8,
        {"tensor": 2, "pipeline": 2, "schedule": "zero_bubble", "sharding": "zero2"},
        {"num_layers": 4, "tie_embeddings": True},
        {"micro_batch": 5},
    ),
    "interleaved_rounds": (4, {"pipeline": 2, "schedule": "interleaved"}, {"num_layers": 5}, {"micro_batch": 1}),
    "interleaved_few": (4, {"pipeline": 4, "schedule": "interleaved"}, {"num_layers": 8}, {"micro_batch": 9}),
    "zero_bubble_few": (4, {"pipeline": 4, "schedule": "zero_bubble"}, {"num_layers": 9}, {"micro_batch": 9}),
}


def run_settings(place_: Path, name: str, case: Case, start: Path | None = None, *, export: bool = False) -> Any:
    _, parallel, model, training = case
    windows = [{"name": name, "tokens": 16 * n, "sources": [{"path": str(place_ / "old")}]} for name, n in (("1", 1), ("5", 5))]
    return config(
        place_,
        name=name,
        folder=str(place_ / name),
        start={"from": str(start), "intent": "resume"} if start else {},
        model=MODEL | model,
        data={"validation": windows},
        training={"budget": 4, "global_batch": 10} | training,
        evaluation={"every": 2, "micro_batch": 2},
        checkpoint={"every": 2, "keep_last": 9},
        export={"huggingface": export},
        parallel=parallel,
    )


def go_on_everywhere(ranks: Ranks, place_: str, cases: dict[str, Case], export: bool = False) -> None:
    """Train each case, and go on from what it saved, and from what one process saved."""
    for name, case in cases.items():
        here = Path(place_) / name
        train(run_settings(here, name, case, export=export), ranks, quiet())
        for source in (name, "alone"):  # the same layout, and another one
            start = here / source / "checkpoints/step_2"
            train(run_settings(here, f"{name}_after_{source}", case, start), ranks, quiet())


def _assert_same(one: Path, other: Path, step: int) -> None:
    wanted, found = (tensors_of(folder / f"checkpoints/step_{step}") for folder in (one, other))
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        # a bias of the keys changes no attention weight: its gradient is rounding noise, which Adam makes large
        if name.startswith("rng") or name.endswith("query_key_value.bias"):
            continue
        rows = [t.flatten(1) if t.dim() > 1 else t[None] for t in (tensor, found[name])]
        scale = rows[0].norm(dim=1).mean() + 1e-30
        most = 1e-2 if name.startswith("optimizer.exp_avg_sq") else 5e-3  # a square is twice as far off
        assert float(((rows[0] - rows[1]).norm(dim=1) / scale).max()) < most, f"{other.name} {step}: {name}"


def train_alone(place_: Path, case: Case, *, export: bool = False) -> None:
    """The run of one process, in ``place_``."""
    place_.mkdir(exist_ok=True)
    settings = run_settings(place_, "alone", (1, {}, case[2], {**case[3], "micro_batch": 5}), export=export)
    train(settings, ALONE, quiet())


def assert_saved_alike(place_: Path, name: str) -> None:
    """What the runs of case ``name`` in ``place_`` saved and measured, against that of one process."""
    alone = place_ / "alone"
    _assert_same(alone, place_ / name, 2)
    for run in (place_ / part for part in (name, f"{name}_after_{name}", f"{name}_after_alone")):
        _assert_same(alone, run, 4)
        for event, value in (("train", "loss"), ("train", "grad_norm"), ("eval", "loss"), ("eval", "over")):
            told = [{(e["step"], e.get("name")): e[value] for e in events(folder, event)} for folder in (alone, run)]
            assert told[1] == pytest.approx({key: told[0][key] for key in told[1]}, rel=1e-4), f"{run}: {event} {value}"


def _check(place_: Path, cases: dict[str, Case]) -> None:
    """``cases`` of one number of ranks."""
    for name, case in cases.items():
        train_alone(place_ / name, case)
    run_ranks(go_on_everywhere, next(iter(cases.values()))[0], str(place_), cases, timeout=300)
    for name in cases:
        assert_saved_alike(place_ / name, name)


def test_what_is_saved_is_the_run_of_one_process(tmp_path: Path) -> None:
    _check(tmp_path, CASES)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_so_it_is_in_other_layouts(tmp_path: Path, name: str) -> None:
    _check(tmp_path, {name: SLOW[name]})


def _not_finite(ranks: Ranks, place_: str, cases: dict[str, Case]) -> list[str]:
    """Parameters with a value that nothing was written to, of models made in memory full of NaN."""
    usual = torch.nn.Module.to_empty

    def poisoned(module: torch.nn.Module, **options: Any) -> torch.nn.Module:
        made = usual(module, **options)
        for parameter in made.parameters():
            parameter.data.fill_(torch.nan)
        return made

    here, found = Path(place_), []
    torch.nn.Module.to_empty = poisoned  # type: ignore[method-assign, assignment]
    try:
        for label, case in cases.items():
            run = build(make_plan(run_settings(here, label, case, here / "alone/checkpoints/step_2")), ranks)
            run.batches.close()
            found += [f"{label}: {name}" for name, p in run.model.parameters.items() if not bool(p.isfinite().all())]
    finally:
        torch.nn.Module.to_empty = usual  # type: ignore[method-assign]
    return found


def test_padding_is_zero_whatever_is_loaded(tmp_path: Path) -> None:
    """Or replicas would differ in memory that was never written, and a run would not be finite."""
    layouts: dict[str, dict[str, Any]] = {"tensor": {"tensor": 2}, "zero2": {"tensor": 2, "sharding": "zero2"}}
    cases: dict[str, Case] = {name: (4, parallel, {"num_layers": 2}, {"micro_batch": 5}) for name, parallel in layouts.items()}
    train_alone(tmp_path, cases["tensor"])
    assert run_ranks(_not_finite, 4, str(tmp_path), cases) == [[]] * 4


# ---- the arithmetic of slices ------------------------------------------------------------------------------------------


@given(st.integers(1, 600), st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 9))
def test_slices_of_all_ranks_make_the_whole(rows: int, tensor: int, shards: int) -> None:
    model = ModelConfig(num_layers=1, hidden_size=16, num_heads=8, vocab_size=rows, rotary_fraction=1.0, ffn_size=24)
    for name in ("embed_in.weight", "layers.0.attention.dense.weight", "layers.0.mlp.dense_4h_to_h.bias"):
        card = cards(model)[name]
        shape = card.shape
        whole = torch.randn(shape)
        found = torch.full(shape, torch.nan)
        boxes = []
        for rank, shard in itertools.product(range(tensor), range(shards)):
            placement = place(card, rank, tensor, False)
            padded = torch.full(placement.local_shape, 7.0)
            chunks = padded.chunk(shards)  # as fully_shard does
            local = chunks[shard] if shard < len(chunks) else padded[:0]
            placement.fill(local, whole, shard, shards)
            mine = placement.slice(local, shard, shards)
            mine.of(found).copy_(mine.local)
            assert float(local.abs().sum()) == pytest.approx(float(mine.local.abs().sum())), "padding is zero"
            if placement.dim is not None or rank == 0:
                boxes.append((mine.offsets, tuple(mine.local.shape)))
        assert torch.equal(found, whole) and tile(shape, boxes)


@given(st.data())
def test_boxes_tile_if_every_place_is_covered_once(data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4)))
    places = st.tuples(*(st.integers(0, n) for n in shape))
    boxes = [
        tuple(zip(*(sorted(ends) for ends in zip(*pair, strict=True)), strict=True))
        for pair in data.draw(st.lists(st.tuples(places, places), max_size=5))
    ]
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(0, shape[0]))
        boxes = [((0, 0), (cut, shape[1])), ((cut, 0), shape)]
    covered = torch.zeros(shape)
    for (a, b), (c, d) in boxes:
        covered[a:c, b:d] += 1
    sized = [((a, b), (c - a, d - b)) for (a, b), (c, d) in boxes]
    assert tile(shape, sized) == bool((covered == 1).all())


# ---- what old revisions wrote ------------------------------------------------------------------------------------------


def _old(rows: int, tensor: int, shards: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The places that revisions up to 98ed75b named, and the true ones."""
    padded = -(-rows // tensor)
    named: list[tuple[int, int]] = []
    true: list[tuple[int, int]] = []
    for rank in range(tensor):
        own = range(rank * padded, min(rows, (rank + 1) * padded))
        for parts, size in ((named, -(-len(own) // shards)), (true, -(-padded // shards))):
            parts += [(own[n * size], len(own[n * size : (n + 1) * size])) for n in range(shards) if n * size < len(own)]
    return named, true


@given(st.integers(4, 400), st.sampled_from([2, 3, 4, 8]), st.integers(2, 9))
def test_misplaced_rows_are_told_from_right_ones(rows: int, tensor: int, shards: int) -> None:
    named, true = _old(rows, tensor, shards)
    assert true_places(rows, true) is None
    found = true_places(rows, named)
    if [first for first, _ in named] == [first for first, _ in true]:
        assert found is None
    else:
        assert found is not None and [place_ for place_ in found[0] if place_[1]] == true


def _write_as_before(ranks: Ranks, folder: str, whole: torch.Tensor) -> None:
    """A shard of the padded rows, shown as what torch makes of one without padding."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tensor", "shard"))
    tensor_rank, shard_rank = divmod(ranks.rank, 2)
    padded = torch.cat([whole, torch.zeros(1, whole.shape[1])])[35 * tensor_rank :][:35]
    local = padded.chunk(2)[shard_rank].clone()
    shown = DTensor.from_local(local, mesh, [Shard(0), Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
    dcp.save({"model.embed_in.weight": shown}, storage_writer=FileSystemWriter(folder))


def test_misplaced_rows_are_read_where_they_belong(tmp_path: Path) -> None:
    whole = torch.randn(69, 6)
    run_ranks(_write_as_before, 4, str(tmp_path), whole)
    wrong = torch.empty_like(whole)
    dcp.load({"model.embed_in.weight": wrong}, checkpoint_id=tmp_path, no_dist=True)
    assert not torch.equal(wrong, whole), "as torch reads it"
    found = torch.empty_like(whole)
    assert stored_tensors(tmp_path) == {"model.embed_in.weight": ((69, 6), torch.float32)}
    load(tmp_path, {"model.embed_in.weight": found}, alone=True)
    assert torch.equal(found, whole)
    for first in (0, 9, 17, 18, 34, 35, 44, 51, 52, 53, 60):
        part = TensorSlice(torch.empty(9, 6), (first, 0), (69, 6))
        load(tmp_path, {"model.embed_in.weight": part}, alone=True)
        assert torch.equal(part.local, whole[first : first + 9])
    told = misplaced_rows(tmp_path)
    assert told is not None and (told.first, told.last, told.unread) == (52, 68, (52,))
