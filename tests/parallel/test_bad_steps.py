"""A fault on one of several ranks is answered by all of them alike, whatever the layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megarewarm.checkpoint.own.state import read_state
from megarewarm.parallel.batch_losses import BatchLosses
from megarewarm.parallel.engine import ParallelModel
from megarewarm.parallel.ranks import Ranks
from megarewarm.training import step
from megarewarm.training.start import inputs
from megarewarm.training.trainer import train
from tests.support.distributed import run_ranks
from tests.support.tiny import config, events, faults, mapping, quiet

LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "zero2": {"sharding": "zero2"},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2},
}


def _guarded(ranks: Ranks, place: str, parallel: dict[str, Any], transient: int, lasting: int) -> dict[str, float]:
    """As ``_train``, with updates that are queued before the host knows loss and norm, as on GPUs."""
    step.GUARDING = ("cpu",)
    inputs.choose_optimizer = lambda *_: ("triton", [])
    return _train(ranks, place, parallel, transient, lasting)


def _train(ranks: Ranks, place: str, parallel: dict[str, Any], transient: int, lasting: int) -> dict[str, float]:
    """Train with a loss that is infinite on the last rank, once in call ``transient``, twice from call ``lasting`` on."""
    original, calls = ParallelModel.forward_backward, [0]

    def damaged(model: ParallelModel, rows: Any, **options: Any) -> BatchLosses:
        losses = original(model, rows, **options)
        calls[0] += 1
        if ranks.rank == ranks.world_size - 1 and calls[0] in (transient, lasting, lasting + 1):
            return replace(losses, totals=torch.full_like(losses.totals, math.inf))
        return losses

    ParallelModel.forward_backward = damaged  # type: ignore[assignment, method-assign]
    try:
        return train(config(Path(place), parallel=parallel), ranks, quiet()).losses
    finally:
        ParallelModel.forward_backward = original  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("layout", "run"),
    [
        *((layout, _train) for layout in LAYOUTS),
        ("data", _guarded),
        pytest.param("tensor", _guarded, marks=pytest.mark.slow),
        pytest.param("zero2", _guarded, marks=pytest.mark.slow),
    ],
)
def test_all_ranks_answer_alike(tmp_path: Path, layout: str, run: Callable[..., dict[str, float]]) -> None:
    never = 10**6
    for name in ("whole", "hit"):
        (tmp_path / name).mkdir()
        mapping(tmp_path / name)  # the token files, before the ranks look for them
    (whole, _) = run_ranks(run, 2, str(tmp_path / "whole"), LAYOUTS[layout], never, never)
    (one, two) = run_ranks(run, 2, str(tmp_path / "hit"), LAYOUTS[layout], 7, 15)
    assert one == two
    folder = tmp_path / "hit/tiny"
    alarms = [(alarm["step"], alarm["kind"]) for alarm in faults(folder)]
    assert alarms == [(7, "transient"), (14, "non_finite")]  # call 15 is the first of step 14, since step 7 took two
    expected = [line["loss"] for line in events(tmp_path / "whole/tiny", "train")]
    found = [line["loss"] for line in events(folder, "train")]
    assert found[:13] == expected[:13] and found[13] is None
    assert found[14] != expected[14], "the update of step 14 is missing"
    assert one != whole
    assert read_state(folder / "checkpoints/step_20").lineage.stages[-1].left_out == [(14, 14)]
