"""The gradients' norm tells of every number that is not finite, also in a part that another rank counts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from tiny import config

from megarewarm.parallel.ranks import Ranks
from megarewarm.training.plan import make_plan
from megarewarm.training.setup import build

LAYOUTS = {
    "tensor": {"tensor": 2},
    "tensor_sequence": {"tensor": 2, "sequence": True},
    "pipeline_tied": {"pipeline": 2},
    "zero2": {"sharding": "zero2"},
}


def _norms(ranks: Ranks, place: str, layouts: dict[str, dict[str, object]]) -> dict[str, tuple[float, list[str]]]:
    """For each layout: the norm of all ones and twos, and the parameters whose NaN on the last rank it doesn't tell."""
    found = {}
    for name, parallel in layouts.items():
        model = {"tie_embeddings": name == "pipeline_tied"}
        run = build(make_plan(config(Path(place), folder=f"{place}/{name}", model=model, parallel=parallel)), ranks)
        run.batches.close()
        run.model.gradients.zero()
        run.model.forward_backward(run.data.share(0, 8, run.mesh.data_rank, run.mesh.layout.data))
        run.model.gradients.reduce()
        clean, unseen = run.model.gradients.norm(), []
        last = sorted(run.model.parameters) if ranks.rank == 1 else []
        names = [None] * 2
        torch.distributed.all_gather_object(names, last)
        for victim in names[1]:
            gradient = run.model.parameters[victim].grad if ranks.rank == 1 else None
            if gradient is not None:
                kept = gradient.view(-1)[:1].clone()
                gradient.view(-1)[:1] = math.nan
            if math.isfinite(run.model.gradients.norm()):
                unseen.append(victim)
            if gradient is not None:
                gradient.view(-1)[:1] = kept
        assert run.model.gradients.norm() == clean
        found[name] = clean, unseen
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_not_finite_on_any_rank_is_seen(tmp_path: Path, name: str) -> None:
    config(tmp_path)
    for found in run_ranks(_norms, 2, str(tmp_path), {name: LAYOUTS[name]}):
        norm, unseen = found[name]
        assert math.isfinite(norm) and norm > 0
        assert unseen == []
