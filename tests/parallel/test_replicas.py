"""A bit that flips in one replica is found, named, and never saved; equal replicas agree in every layout."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megarewarm.config.load import merge
from megarewarm.parallel.mesh import Layout
from megarewarm.parallel.ranks import Ranks
from megarewarm.parallel.replicas import ReplicasDiffer, _holders, checksum
from megarewarm.training import trainer
from megarewarm.training.after_step.replicas import replica_checks
from megarewarm.training.trainer import train
from tests.support.distributed import run_ranks
from tests.support.tiny import config, events, mapping, quiet


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 300), seed=st.integers(0, 99), data=st.data())
def test_every_changed_bit_changes_the_checksum(size: int, seed: int, data: st.DataObject) -> None:
    values = torch.from_numpy(np.random.default_rng(seed).standard_normal(size).astype(np.float32))
    before = checksum(values)
    place, bit = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 31))
    words = values.view(torch.int32)
    words[place] ^= -(2**31) if bit == 31 else 2**bit
    assert checksum(values) != before
    words[place] ^= -(2**31) if bit == 31 else 2**bit
    assert checksum(values) == before


def test_values_that_change_places_change_it_and_pieces_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(1.0, 1001.0)
    whole = checksum(values)
    assert checksum(values.flip(0)) != whole
    monkeypatch.setattr("megarewarm.parallel.replicas._PIECE", 7)
    assert checksum(values) == whole == checksum(values.reshape(10, 100))


def test_which_ranks_hold_the_same() -> None:
    assert _holders("replicated", Layout(1, 4, 1, 1)) == [[0, 1, 2, 3]]
    assert _holders("replicated", Layout(1, 2, 1, 2)) == [[0, 2], [1, 3]]
    assert _holders("replicated", Layout(2, 2, 1, 1)) == [[0, 1], [2, 3]]
    assert _holders("replicated", Layout(1, 2, 2, 1)) == [[0, 2], [1, 3]]
    assert _holders("on tensor ranks", Layout(1, 2, 1, 2)) == [[0, 1, 2, 3]]
    assert _holders("on tensor ranks", Layout(1, 2, 2, 2)) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert _holders("tied", Layout(3, 2, 1, 1)) == [[0, 1, 4, 5]]
    assert _holders("tied", Layout(2, 1, 1, 2)) == [[0, 2], [1, 3]]


MATRIX = "layers.1.mlp.dense_h_to_4h.weight"
FLIPPED, STEPS = 6, 8


def _train(ranks: Ranks, place: str, flipped: int | None, changes: dict[str, Any], name: str, moment: str | None) -> str | None:
    """Train, with a bit of a parameter or its moment flipped on rank ``flipped`` after step ``FLIPPED``; the message that ends
    the run."""
    original = trainer.training_step

    def step(run: Any, lr: float) -> Any:
        result = original(run, lr)
        if run.step == FLIPPED and ranks.rank == flipped:
            held = run.model.parameters[name].data if moment is None else run.optimizer.state()[moment, name]
            held.view(-1).view(torch.int32)[3] ^= 1 << 20
        return result

    trainer.training_step = step
    try:
        short = {"training": {"budget": STEPS}, "evaluation": {"every": 4}, "checkpoint": {"every": 4}}
        train(config(Path(place), **merge(short, changes)), ranks, quiet())
    except ReplicasDiffer as error:
        return str(error)
    finally:
        trainer.training_step = original
    return None


def _train_and_go_on(ranks: Ranks, *args: Any) -> tuple[str | None, list[str], str | None]:
    """What ended the run with a flipped bit, the checkpoints it left, and what ended the same command after it."""
    ended = _train(ranks, *args)
    dist.barrier()
    left = sorted(path.name for path in Path(args[0], "tiny/checkpoints").iterdir())
    dist.barrier()
    return ended, left, _train(ranks, args[0], None, *args[2:])


NORM = "layers.0.input_layernorm.weight"
TIED = {"model": {"tie_embeddings": True}, "parallel": {"pipeline": 2}, "training": {"micro_batch": 2}}


@pytest.mark.parametrize(
    ("world_size", "changes", "name", "moment", "named"),
    [
        (2, {}, MATRIX, None, "ranks 0 on {host}, 1 on {host} should be equal and differ in layers.1.mlp.dense_h_to_4h.weight"),
        (3, {"training": {"global_batch": 6, "micro_batch": 2}}, MATRIX, None, "the weights of rank 1 on {host} changed"),
        (4, {"parallel": {"sharding": "zero2", "shard_ranks": 2}}, MATRIX, None, "ranks 1 on {host}, 3 on {host} should be"),
        (
            4,
            {"parallel": {"tensor": 2}},
            MATRIX,
            None,
            "ranks 1 on {host}, 3 on {host} should be equal and differ in layers.1.mlp",
        ),
        # seen before it reaches the weights, so that no checkpoint has it
        (2, {"checkpoint": {"every": 3}}, MATRIX, "exp_avg_sq", "should be equal and differ in exp_avg_sq of layers.1.mlp"),
        (
            2,
            {"parallel": {"tensor": 2, "sequence": True}},
            NORM,
            None,
            "should be equal and differ in layers.0.input",
        ),
        (2, TIED, "embed_in.weight", None, "ranks 0 on {host}, 1 on {host} should be equal and differ in embed_in.weight"),
    ],
    ids=["two", "majority", "sharded", "tensor", "moment", "whole_on_tensor_ranks", "tied"],
)
def test_a_flipped_bit_ends_the_run_and_is_not_saved(
    tmp_path: Path, world_size: int, changes: dict[str, Any], name: str, moment: str | None, named: str
) -> None:
    host = socket.gethostname()
    every = changes.get("checkpoint", {"every": 4})["every"]
    mapping(tmp_path)  # the token files, before the ranks look for them
    answers = run_ranks(_train_and_go_on, world_size, str(tmp_path), 1, changes, name, moment)
    message, left, after = answers[0]
    assert answers == [answers[0]] * world_size and message is not None
    assert named.format(host=host) in message
    assert left == [f"step_{step}" for step in range(every, FLIPPED, every)] != []
    folder = tmp_path / "tiny"
    assert [line["reason"] for line in events(folder, "stop")] == ["replicas differ", "complete"]
    # the same command goes on from the last checkpoint, to the end
    assert after is None and (folder / f"checkpoints/step_{STEPS}").is_dir()


def test_the_ends_of_a_pipeline_stay_equal_with_three_replicas(tmp_path: Path) -> None:
    """A sum of three ranks depends on the order in which a collective takes them, and that on a value's place in its buffer."""
    changes = {**TIED, "training": {"global_batch": 6, "micro_batch": 1}, "reliability": {"check_replicas": 1}}
    mapping(tmp_path)
    assert run_ranks(_train, 6, str(tmp_path), None, changes, MATRIX, None) == [None] * 6


def test_comparing_can_be_turned_off_and_has_its_interval(tmp_path: Path) -> None:
    off = {"reliability": {"check_replicas": None}}
    mapping(tmp_path)
    assert run_ranks(_train, 2, str(tmp_path), 1, off, MATRIX, None) == [None, None]
    every = config(tmp_path, reliability={"check_replicas": 3})
    assert list(replica_checks(every, 0)) == [3, 6, 9, 12, 15, 18]
    assert list(replica_checks(every, 7)) == [9, 12, 15, 18]
    assert list(replica_checks(config(tmp_path, **off), 0)) == []
