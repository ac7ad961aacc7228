"""Functions that all ranks must call: a rank that calls another one is named, and training calls them alike on all ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from megarewarm.parallel.agreement import all_reduce_sums, gather, on_all_ranks
from megarewarm.parallel.collective import collective
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.trainer import train
from tests.support.collectives import compared
from tests.support.distributed import run_ranks
from tests.support.tiny import config, quiet


@collective
def _verify(*, alone: bool = False) -> None:
    """Sends nothing itself. All ranks call it, unless ``alone``."""


def _another_one(ranks: Ranks) -> str:
    with compared() as entered:
        _verify()
        all_reduce_sums([1.0])
        if ranks.rank == 1:
            _verify(alone=True)
        try:
            if ranks.rank == 1:
                gather("word")
            else:
                all_reduce_sums([2.0])
        except AssertionError as error:
            assert len(entered["MainThread"]) == 3
            return str(error)
    return "nothing"


def test_ranks_that_enter_two_functions_are_named() -> None:
    said = run_ranks(_another_one, 3)
    place = "megarewarm.parallel.agreement"
    assert all(f"{place}.all_reduce_sums" in each and f"{place}.gather" in each for each in said), said
    assert said[0].startswith(f"rank 0 enters {place}.all_reduce_sums, rank 1 enters {place}.gather: call 3")


def _one_too_many(ranks: Ranks) -> str:
    with compared(patience=2.0):
        all_reduce_sums([1.0])
        try:
            if ranks.rank == 0:
                on_all_ranks(None, OSError)
        except AssertionError as error:
            return str(error)
    return ""


def test_a_rank_that_enters_nothing_is_named() -> None:
    place = "megarewarm.parallel.agreement"
    expected = f"rank 0 enters {place}.on_all_ranks, rank 1 enters nothing (its last was {place}.all_reduce_sums)"
    assert run_ranks(_one_too_many, 2) == [expected, ""]


def _train(ranks: Ranks, place: str, changes: dict[str, Any]) -> dict[str, list[str]]:
    with compared() as entered:
        train(config(Path(place), **changes, training={"budget": 6}), ranks, quiet())
    return dict(entered)


LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {"checkpoint": {"every": 2}, "logging": {"tensorboard": False, "dynamics": 2, "start_distance": True}},
    "tensor": {"parallel": {"tensor": 2}, "checkpoint": {"every": 3, "asynchronous": False}},
    "pipeline": {
        "parallel": {"pipeline": 2},
        "checkpoint": {"every": 5},
        "evaluation": {"windows": "moving", "at_start": False},
        "optimizer": {"kind": "muon"},
    },
}


@pytest.mark.parametrize("changes", LAYOUTS.values(), ids=LAYOUTS)
def test_training_enters_the_same_on_all_ranks(tmp_path: Path, changes: dict[str, Any]) -> None:
    config(tmp_path)  # writes the token files before several ranks look for them
    for goes_on in (False, True):
        one, two = run_ranks(_train, 2, str(tmp_path), changes)
        assert one == two and any(thread.startswith("checkpoint") for thread in one)
        names = {name.rpartition(".")[2] for functions in one.values() for name in functions}
        assert names >= {"forward_backward", "all_reduce_sums", "gather", "on_all_ranks", "write", "wait", "lock", "open"}
        assert not goes_on or names >= {"find_damage", "verify", "load"}
        shutil.rmtree(tmp_path / "tiny/checkpoints/step_6")
