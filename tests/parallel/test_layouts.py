"""Every layout of the ranks computes the run of a single process: losses, gradient norms, weights."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from megarewarm.checkpoint.source import OwnCheckpoint
from megarewarm.model.fused import Operations
from megarewarm.model.parameters import cards
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.start import inputs
from megarewarm.training.trainer import train
from tests.support.distributed import run_ranks
from tests.support.tiny import config, events, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))
# an odd vocabulary (padded rows under tensor parallelism), three layers (uneven stages), four heads
MODEL = {"num_layers": 3, "hidden_size": 16, "num_heads": 4, "rotary_fraction": 0.5, "vocab_size": 67}
FIVE = {"num_layers": 5}  # two stages on each of two ranks, unevenly
STEPS = 8
FUSED = Operations(norms="triton", gelu="triton", attention="cudnn", loss="reference")
DOCUMENTS = {"eod": 5, "reset_at_eod": True, "mask_eod_loss": True}

# name -> (parallel settings, other changes)
Layout = tuple[dict[str, Any], dict[str, Any]]
LAYOUTS: dict[int, dict[str, Layout]] = {
    2: {
        "data": ({}, {}),
        "tensor": ({"tensor": 2}, {}),
        "tensor_sequence": ({"tensor": 2, "sequence": True}, {}),
        "tensor_sequential_residual": ({"tensor": 2}, {"model": {"residual": "sequential", "attention_bias": False}}),
        "tensor_sequence_sequential": ({"tensor": 2, "sequence": True}, {"model": {"residual": "sequential"}}),
        "tensor_tied": ({"tensor": 2}, {"model": {"tie_embeddings": True}}),
        "pipeline": ({"pipeline": 2}, {}),
        "pipeline_accumulation": ({"pipeline": 2}, {"training": {"micro_batch": 2}}),
        "pipeline_uneven_batch": ({"pipeline": 2}, {"training": {"micro_batch": 3}}),
        "pipeline_few_micro_batches": ({"pipeline": 2}, {"training": {"micro_batch": 8}}),
        "pipeline_tied": ({"pipeline": 2}, {"model": {"tie_embeddings": True}, "training": {"micro_batch": 2}}),
        "pipeline_interleaved": (
            {"pipeline": 2, "schedule": "interleaved"},
            {"model": FIVE, "training": {"micro_batch": 2}},
        ),
        "pipeline_zero_bubble": (
            {"pipeline": 2, "schedule": "zero_bubble"},
            {"model": FIVE, "training": {"micro_batch": 2}},
        ),
        "pipeline_zero_bubble_tied": (
            {"pipeline": 2, "schedule": "zero_bubble"},
            {"model": {"tie_embeddings": True, **FIVE}, "training": {"micro_batch": 2}},
        ),
        "zero2": ({"sharding": "zero2"}, {"training": {"micro_batch": 1}}),
        "zero3": ({"sharding": "zero3"}, {"training": {"micro_batch": 1}}),
        "zero3_tied": ({"sharding": "zero3"}, {"model": {"tie_embeddings": True}}),
        "data_documents": ({}, {"data": DOCUMENTS}),
        "tensor_sequence_documents": ({"tensor": 2, "sequence": True}, {"data": DOCUMENTS}),
        "pipeline_documents": ({"pipeline": 2}, {"data": DOCUMENTS, "training": {"micro_batch": 3}}),
        "zero_bubble_documents": (
            {"pipeline": 2, "schedule": "zero_bubble"},
            {"model": FIVE, "data": DOCUMENTS, "training": {"micro_batch": 2}},
        ),
        "zero3_documents": ({"sharding": "zero3"}, {"data": DOCUMENTS}),
        "data_fused": ({}, {"fused": True}),
        "tensor_fused": ({"tensor": 2}, {"fused": True}),
        "pipeline_fused": ({"pipeline": 2}, {"fused": True, "training": {"micro_batch": 2, "recompute": "full"}}),
        "zero3_fused": ({"sharding": "zero3"}, {"fused": True}),
        "zero_bubble_fused": (
            {"pipeline": 2, "schedule": "zero_bubble"},
            {"model": FIVE, "fused": True, "training": {"micro_batch": 2}},
        ),
    },
    4: {
        "data": ({}, {}),
        "tensor": ({"tensor": 4}, {}),
        "tensor_data": ({"tensor": 2}, {"training": {"micro_batch": 1}}),
        "tensor_sequence_data": ({"tensor": 2, "sequence": True}, {}),
        "pipeline": ({"pipeline": 4}, {"model": FIVE, "training": {"micro_batch": 2}}),
        "pipeline_data": ({"pipeline": 2}, {"training": {"micro_batch": 2}}),
        "pipeline_tensor": ({"pipeline": 2, "tensor": 2}, {"training": {"micro_batch": 2}}),
        "pipeline_tensor_sequence_tied": (
            {"pipeline": 2, "tensor": 2, "sequence": True},
            {"model": {"tie_embeddings": True}, "training": {"micro_batch": 2}},
        ),
        "interleaved_tensor": (
            {"pipeline": 2, "tensor": 2, "schedule": "interleaved"},
            {"model": FIVE, "training": {"micro_batch": 2}},
        ),
        "zero3": ({"sharding": "zero3"}, {}),
        "hybrid": ({"sharding": "zero2", "shard_ranks": 2}, {}),
        "tensor_zero3": ({"tensor": 2, "sharding": "zero3"}, {"model": {"vocab_size": 69}}),
        "pipeline_zero2": ({"pipeline": 2, "sharding": "zero2"}, {"training": {"micro_batch": 2}}),
        "interleaved": (
            {"pipeline": 4, "schedule": "interleaved"},
            {"model": {"num_layers": 9}, "training": {"micro_batch": 1}},
        ),
        "zero_bubble": (
            {"pipeline": 4, "schedule": "zero_bubble"},
            {"model": {"num_layers": 9}, "training": {"micro_batch": 1}},
        ),
    },
    8: {
        "tensor_pipeline_data": ({"tensor": 2, "pipeline": 2}, {"training": {"micro_batch": 2}}),
        "all_sequence": ({"tensor": 2, "sequence": True, "pipeline": 2}, {"training": {"micro_batch": 1}}),
        "all_zero2": (
            {"tensor": 2, "pipeline": 2, "sharding": "zero2"},
            {"model": {"vocab_size": 69}, "training": {"micro_batch": 2}},
        ),
        "data": ({}, {"training": {"micro_batch": 1}}),
    },
}

# tried in every run of the tests, each kind once; the others are slow
EVERY_TIME = {
    2: [
        "data_documents",
        "data_fused",
        "tensor_sequence_documents",
        "tensor_sequential_residual",
        "tensor_tied",
        "tensor_fused",
        "pipeline_few_micro_batches",
        "pipeline_interleaved",
        "zero_bubble_documents",
        "pipeline_fused",
        "zero2",
        "zero3_tied",
    ],
    4: ["pipeline_tensor_sequence_tied", "tensor_zero3", "hybrid"],
    8: ["all_sequence"],
}


def _settings(place: Path, name: str, parallel: dict[str, Any], changes: dict[str, Any]) -> Any:
    return config(
        place,
        name=name,
        folder=str(place / name),
        model=MODEL | changes.get("model", {}),
        data=changes.get("data", {}),
        training={"budget": STEPS, "global_batch": 8, "micro_batch": 4} | changes.get("training", {}),
        evaluation={"every": 4},
        checkpoint={"every": None, "keep_last": 1},
        parallel=parallel,
    )


def _train_all(ranks: Ranks, place: str, layouts: dict[str, Layout]) -> None:
    usual = inputs.choose_operations
    for name, (parallel, changes) in layouts.items():
        # on a CPU these compute their definitions: the layout is what is tested
        inputs.choose_operations = (lambda *_, **__: (FUSED, [])) if changes.get("fused") else usual
        train(_settings(Path(place), name, parallel, changes), ranks, quiet())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    config(folder)  # writes the token files before several ranks look for them
    return folder


def _alone(place: Path, changes: dict[str, Any]) -> Path:
    """The folder of the single-process run with the same model and batch."""
    kept: dict[str, Any] = {key: changes[key] for key in ("model", "data") if key in changes}
    name = f"alone_{'_'.join(f'{key}_{value}' for part in kept.values() for key, value in sorted(part.items()))}"
    train(_settings(place, name, {}, kept), ALONE, quiet())
    return place / name


def _column(folder: Path, event: str, key: str) -> list[float]:
    return [line[key] for line in events(folder, event)]


def assert_same_run(run: Path, alone: Path) -> None:
    """Losses, norms and validation losses of every step, and the last weights, within fp32 rounding."""
    steps = len(_column(alone, "train", "loss"))
    assert len(_column(run, "train", "loss")) == steps >= STEPS
    assert _column(run, "train", "loss") == pytest.approx(_column(alone, "train", "loss"), rel=1e-5)
    assert _column(run, "train", "grad_norm") == pytest.approx(_column(alone, "train", "grad_norm"), rel=1e-4)
    assert _column(run, "eval", "loss") == pytest.approx(_column(alone, "eval", "loss"), rel=1e-5)
    assert _column(run, "eval", "over") == _column(alone, "eval", "over")
    saved = [OwnCheckpoint(folder / "checkpoints" / f"step_{steps}") for folder in (alone, run)]
    one, other = (checkpoint.whole_model().state_dict() for checkpoint in saved)
    assert one.keys() == other.keys()
    for name, weight in one.items():
        mine = other[name]
        if name.endswith("query_key_value.bias"):
            # a bias of the keys changes no attention weight: its gradient is rounding noise, which Adam makes large
            several = cards(saved[0].model_config)[name].interleaved
            assert several is not None
            weight, mine = (torch.cat([queries, values]) for queries, _, values in map(several.split, (weight, mine)))
        # by tensor, not by element: where a gradient is next to nothing, Adam makes rounding large
        difference = float(torch.linalg.vector_norm(mine - weight) / torch.linalg.vector_norm(weight))
        assert difference < (5e-5 if weight.dim() == 2 else 3e-4), f"{name}: {difference:.1e}"


def _compare(world_size: int, names: Collection[str], place: Path) -> None:
    base = place / str(world_size)
    base.mkdir(exist_ok=True)
    config(base)
    run_ranks(_train_all, world_size, str(base), {name: LAYOUTS[world_size][name] for name in names}, timeout=600)
    for name in names:
        assert_same_run(base / name, _alone(base, LAYOUTS[world_size][name][1]))


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_layouts_compute_the_run_of_one_process(world_size: int, place: Path) -> None:
    _compare(world_size, EVERY_TIME[world_size], place)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", LAYOUTS)
def test_all_other_layouts_do_as_well(world_size: int, place: Path) -> None:
    _compare(world_size, LAYOUTS[world_size].keys() - set(EVERY_TIME[world_size]), place)
