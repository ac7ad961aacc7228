"""Every layout of the ranks gives the values of one process, and a run whose losses don't know that rows were valued."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megarewarm.config.schema import RunConfig
from megarewarm.errors import UserError
from megarewarm.parallel.ranks import Ranks
from megarewarm.record.values import Values
from megarewarm.training.start import inputs
from megarewarm.training.trainer import train
from tests.parallel.test_layouts import FUSED, LAYOUTS, MODEL
from tests.support.distributed import run_ranks
from tests.support.tiny import config, events, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))
Changes = dict[str, Any]
EVERY_TIME = {
    2: ["data_documents", "tensor_sequence_documents", "tensor_fused", "pipeline_tied", "pipeline_zero_bubble_tied", "zero3"],
    4: ["pipeline_tensor_sequence_tied", "tensor_zero3", "hybrid", "tensor_data"],
}


def settings(place: Path, name: str, parallel: Changes, changes: Changes, **more: Any) -> RunConfig:
    """Of few validation rows, so that some ranks have none, and valued rows that ranks share unevenly. No attention biases:
    the keys' have no gradient but rounding noise, and Adam's preconditioner makes a direction of it."""
    return config(
        place,
        name=name,
        folder=str(place / name),
        model=MODEL | {"attention_bias": False} | changes.get("model", {}),
        data=changes.get("data", {}),
        training={"budget": 10, "global_batch": 8, "micro_batch": 4} | changes.get("training", {}),
        evaluation={"every": 10},
        checkpoint={"every": None, "keep_last": 1},
        parallel=parallel,
        **({"valuation": {"against": ["old", "new"], "every": 5, "rows": 3, "share": 0.7}} | more),
    )


def _train_all(ranks: Ranks, place: str, world_size: int, names: Collection[str]) -> None:
    usual = inputs.choose_operations
    for name in names:
        parallel, changes = LAYOUTS[world_size][name]
        inputs.choose_operations = (lambda *_, **__: (FUSED, [])) if changes.get("fused") else usual
        train(settings(Path(place), name, parallel, changes), ranks, quiet())
        train(settings(Path(place), f"{name}_without", parallel, changes, valuation=None), ranks, quiet())


def _compare(world_size: int, names: Collection[str], place: Path) -> None:
    config(place)
    run_ranks(_train_all, world_size, str(place), world_size, names, timeout=600)
    for name in names:
        changes = LAYOUTS[world_size][name][1]
        kept: Changes = {key: changes[key] for key in ("model", "data") if key in changes}
        alone = train(settings(place, f"alone_{name}", {}, kept), ALONE, quiet()).folder
        one, other = Values(alone), Values(place / name)
        assert other.position.tolist() == one.position.tolist() and len(one) == 2 * 6
        for against, values in one.values.items():
            for step in (5, 10):
                mine, theirs = values[one.step == step], other.values[against][one.step == step]
                difference = float(np.linalg.norm(theirs - mine) / np.linalg.norm(mine))
                assert difference < (1e-2 if step == 5 else 3e-3), f"{name}, step {step}, {against}: {difference:.1e}"
        for line, wanted in zip(events(place / name, "value"), events(alone, "value"), strict=True):
            for key in ("samples", "momentum", "decay", "measured"):
                assert line[key] == pytest.approx(wanted[key], rel=2e-3, abs=2e-3 * abs(wanted["measured"])), f"{name}, {key}"
        with_values, without = ([line["loss"] for line in events(place / run, "train")] for run in (name, f"{name}_without"))
        assert with_values == without


@pytest.mark.parametrize("world_size", EVERY_TIME)
def test_layouts_give_the_values_of_one_process(world_size: int, tmp_path: Path) -> None:
    _compare(world_size, EVERY_TIME[world_size][: 3 if world_size == 2 else 1], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", EVERY_TIME)
def test_all_other_layouts_do_as_well(world_size: int, tmp_path: Path) -> None:
    _compare(world_size, sorted(LAYOUTS[world_size].keys()), tmp_path)


def _refused(ranks: Ranks, place: str) -> str:
    changes = {"training": {"precision": "bf16"}}
    with pytest.raises(UserError) as refused:
        train(settings(Path(place), "refused", {"sharding": "zero2"}, changes), ranks, quiet())
    return str(refused.value)


def test_shards_in_low_precision_are_refused(tmp_path: Path) -> None:
    config(tmp_path)
    for said in run_ranks(_refused, 2, str(tmp_path)):
        assert said.startswith("valuation: with parallel.sharding the forward pass rounds weights to bf16") and "\n" not in said
    assert not (tmp_path / "refused").exists()


def _low(ranks: Ranks, place: str) -> None:
    for name, parallel in {"pipeline": {"pipeline": 2}, "tensor": {"tensor": 2}, "data": {}}.items():
        inputs.choose_operations = lambda *_, **__: (FUSED, [])
        train(settings(Path(place), name, parallel, {"training": {"precision": "bf16"}}), ranks, quiet())


@pytest.mark.slow
def test_low_precision_has_nearly_the_values_of_fp32(tmp_path: Path) -> None:
    """Stages of fused layers pass on bf16 in training and fp32 in the passes of the differences."""
    alone = Values(train(settings(tmp_path, "alone", {}, {}), ALONE, quiet()).folder)
    run_ranks(_low, 2, str(tmp_path))
    for name in ("pipeline", "tensor", "data"):
        found = Values(tmp_path / name)
        for against, values in alone.values.items():
            assert np.corrcoef(found.values[against], values)[0, 1] > 0.98, name
