"""A checkpoint goes from layout to layout and comes back: every weight, moment and counter is bit for bit what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from megarewarm.checkpoint.own import store
from megarewarm.checkpoint.own.integrity import find_damage
from megarewarm.checkpoint.own.retention import Retention
from megarewarm.checkpoint.own.saver import Saver
from megarewarm.checkpoint.own.state import read_state
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.setup import build
from megarewarm.training.start.plan import make_plan
from megarewarm.training.trainer import train
from tests.support.distributed import run_ranks
from tests.support.tiny import config, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))
# tensor x pipeline x data, and ways of sharing out what data-parallel ranks hold
WAY = {
    "2x1x1": (2, {"tensor": 2}),
    "1x2x1": (2, {"pipeline": 2}),
    "1x1x2": (2, {}),
    "1x1x2_zero3": (2, {"sharding": "zero3"}),
    "2x2x2": (8, {"tensor": 2, "pipeline": 2}),
    "2x2x2_zero2": (8, {"tensor": 2, "pipeline": 2, "sharding": "zero2"}),
}


def settings(place: Path, name: str, start: str | None, parallel: dict[str, Any]) -> Any:
    return config(
        place,
        name=name,
        folder=str(place / name),
        start={"from": start, "intent": "resume"} if start else {},
        training={"budget": 12, "micro_batch": 1},
        parallel=parallel,
    )


def _load_and_save(ranks: Ranks, place: str, way: list[tuple[str, str, dict[str, Any]]]) -> None:
    for name, start, parallel in way:
        run = build(make_plan(settings(Path(place), name, start, parallel)), ranks)
        with Saver(Path(place) / name / "checkpoints", Retention(1), asynchronous=True) as saver:
            saver.save(run.training_state({}), run.tensors())
            saver.wait()
        run.batches.close()


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in store.stored_tensors(checkpoint).items()}
    dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    return tensors


def test_from_every_layout_to_the_next_and_back(tmp_path: Path) -> None:
    start = config(tmp_path, name="start", folder=str(tmp_path / "start"), training={"budget": 12, "micro_batch": 1})
    train(start, ALONE, quiet())
    first = tmp_path / "start/checkpoints/step_10"
    wanted = tensors_of(first)
    assert {name.split(".")[0] for name in wanted} == {"model", "optimizer", "rng"}
    source, chain = first, list(WAY.items())
    for ranks in (2, 8):  # one set of processes for each number of ranks
        way = []
        for name, (_, parallel) in [entry for entry in chain if entry[1][0] == ranks]:
            way.append((name, str(source), parallel))
            source = tmp_path / name / "checkpoints/step_10"
        run_ranks(_load_and_save, ranks, str(tmp_path), way, timeout=300)
    _load_and_save(ALONE, str(tmp_path), [("back", str(source), {})])
    for name in (*WAY, "back"):
        checkpoint = tmp_path / name / "checkpoints/step_10"
        assert find_damage(checkpoint) is None
        found = tensors_of(checkpoint)
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            if not key.startswith("rng"):
                assert torch.equal(found[key], tensor), f"{name}: {key}"
        before, after = read_state(first), read_state(checkpoint)
        counters = ("step", "optimizer_step", "schedule_position", "schedule", "samples", "data_fingerprint")
        for counter in counters:
            assert getattr(before, counter) == getattr(after, counter), f"{name}: {counter}"
