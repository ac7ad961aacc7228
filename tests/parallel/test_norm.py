"""The gradients' norm tells of every number that is not finite, also in a part that another rank counts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megarewarm.parallel.gradients import FlatGradients, OwnGradients, squared_norm
from megarewarm.parallel.mesh import Layout, Mesh
from megarewarm.parallel.placement import Placement
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.setup import build
from megarewarm.training.start.plan import make_plan
from tests.support.distributed import run_ranks
from tests.support.tiny import config

ALONE = Ranks(0, 1, torch.device("cpu"))
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
        names: list[Any] = [None] * 2
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


def test_the_norm_of_many_values_has_all_its_digits() -> None:
    """A fp32 sum in few parts loses 1e-3 here; both storages of gradients measure the same."""
    values = torch.full((20_000_123,), 1e-3)
    values[::3] = -3e-3
    wanted = math.sqrt(sum(float(part.double().square().sum()) for part in values.split(2**20)))
    parameter = torch.nn.Parameter(torch.empty_like(values))
    parameter.grad = values
    flat = FlatGradients({"w": parameter}, {"w": Placement("w", tuple(values.shape), None, 0, 1, False)}, Mesh(ALONE, Layout()))
    parameter.grad.copy_(values)
    assert flat.norm() == pytest.approx(wanted, rel=5e-7)
    parameter.grad = values
    assert OwnGradients({"w": parameter}).norm() == pytest.approx(wanted, rel=5e-7)
    pieces = [values[:100], values[100:100], values[100:5000], values[5000:]]
    assert float(squared_norm(pieces)) == pytest.approx(wanted**2, rel=5e-7)
    assert math.isinf(float(squared_norm([torch.tensor([1.0, math.inf])]))) and float(squared_norm([values[:0]])) == 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_not_finite_on_any_rank_is_seen(tmp_path: Path, name: str) -> None:
    config(tmp_path)
    for found in run_ranks(_norms, 2, str(tmp_path), {name: LAYOUTS[name]}):
        norm, unseen = found[name]
        assert math.isfinite(norm) and norm > 0
        assert unseen == []
