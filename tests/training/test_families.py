"""Distillation, dynamics, layer-wise rates and interpolation of Llama's relatives: by definition, and in layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from megarewarm.checkpoint.source import OwnCheckpoint
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.setup import build
from megarewarm.training.start.plan import make_plan
from megarewarm.training.trainer import train
from tests.parallel.test_families import told
from tests.support.distributed import run_ranks
from tests.support.family_shapes import SHAPES, shape
from tests.support.tiny import config, events, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))
EVERY = [name if name in ("qwen3", "olmo2") else pytest.param(name, marks=pytest.mark.slow) for name in SHAPES]
ALPHAS = [0.5, 1.5]
LAYOUTS: dict[str, dict[str, Any]] = {
    "sequence": {"tensor": 2, "sequence": True},
    "pipeline": {"pipeline": 2},
    "zero2": {"sharding": "zero2"},
}


def settings(place: Path, name: str, model: str, **changes: Any) -> Any:
    usual = {"start": {"from": str(place / "up")}, "model": shape(model, 2), "schedule": {"max_lr": 2e-3}}
    return config(place, name=name, folder=str(place / name), training={"budget": 4}, **usual | changes)


def begin(place: Path, model: str) -> None:
    """The run that the others start from, in ``place``."""
    config(place)
    data = {"train": [{"path": str(place / "old"), "max_epochs": 9}]}
    start: dict[str, Any] = {"start": {}, "data": data}
    train(settings(place, "up", model, **start), ALONE, quiet())


def _train(ranks: Ranks, place: str, model: str, runs: dict[str, dict[str, Any]]) -> None:
    for name, changes in runs.items():
        train(settings(Path(place), name, model, **changes), ranks, quiet())


@pytest.mark.parametrize("model", EVERY)
def test_distillation(tmp_path: Path, model: str) -> None:
    """The gradients of the two losses written out, and the run of one process on two ranks."""
    begin(tmp_path, model)
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(67, (8, 17), generator=random)
    runs = {}
    for kind in ("logits", "hidden"):
        distill = {"distill": {"kind": kind, "weight": 0.5}}
        run = build(make_plan(settings(tmp_path, f"grad_{kind}", model, **distill)), ALONE)
        run.batches.close()
        student, teacher = (OwnCheckpoint(tmp_path / "up/checkpoints/step_4").whole_model() for _ in range(2))
        for parameter in run.model.parameters.values():  # away from the teacher
            parameter.data.add_(torch.randn(parameter.shape, generator=random), alpha=0.02)
        student.load_state_dict(dict(run.model.parameters))
        losses = run.model.forward_backward(rows.numpy().astype(np.int64))
        inputs, targets = rows[:, :-1], rows[:, 1:].flatten()
        logits, wanted = student.logits(inputs).flatten(0, 1), teacher.logits(inputs).flatten(0, 1).detach()
        if kind == "logits":
            term = F.kl_div(logits.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean")
        else:
            term = F.mse_loss(student(inputs), teacher(inputs).detach())
        (F.cross_entropy(logits, targets) + 0.5 * term).backward()
        for name, parameter in student.named_parameters():
            torch.testing.assert_close(run.model.parameters[name].grad, parameter.grad, rtol=1e-4, atol=2e-6)
        assert losses.distilled / targets.numel() == pytest.approx(float(term.detach()), rel=1e-5)
        train(settings(tmp_path, f"one_{kind}", model, **distill), ALONE, quiet())
        runs[f"two_{kind}"] = distill | {"parallel": {"sharding": "zero3"}}
    run_ranks(_train, 2, str(tmp_path), model, runs, timeout=300)
    for kind in ("logits", "hidden"):
        for value in ("loss", "grad_norm", "distill_loss"):
            one, two = (told(tmp_path / f"{which}_{kind}", "train", value) for which in ("one", "two"))
            del one[1, None], two[1, None]  # the teacher's term is rounding where the run begins
            assert two == pytest.approx(one, rel=1e-3), (kind, value)


@pytest.mark.parametrize("model", EVERY)
def test_layouts_measure_and_interpolate_as_one_process(tmp_path: Path, model: str) -> None:
    """Dynamics of a run with layer-wise rates, its norms, and its weights between start and end."""
    begin(tmp_path, model)
    usual = {"logging": {"dynamics": "2 steps"}, "interpolate": {"alphas": ALPHAS}, "optimizer": {"layer_decay": 0.5}}
    alone = train(settings(tmp_path, "alone", model, **usual), ALONE, quiet()).folder
    runs = {name: usual | {"parallel": parallel} for name, parallel in LAYOUTS.items()}
    run_ranks(_train, 2, str(tmp_path), model, runs, timeout=300)
    moved = events(alone, "dynamics")[-1]["groups"]
    assert {"embed_in", "layers.0", "layers.1", "final_layer_norm", "all"} <= moved.keys()
    rates = [moved[group]["effective_lr"] for group in ("embed_in", "layers.0", "layers.1", "final_layer_norm")]
    assert all(rate > 0 for rate in rates)
    for name in LAYOUTS:
        wanted, found = (events(folder, "dynamics") for folder in (alone, tmp_path / name))
        assert [line["step"] for line in found] == [2, 4]
        for one, other in zip(wanted, found, strict=True):
            assert one["groups"].keys() == other["groups"].keys()
            for group, numbers in one["groups"].items():
                for key in ("weight_norm", "distance", "first_moment_norm", "second_moment_norm"):
                    assert other["groups"][group][key] == pytest.approx(numbers[key], rel=2e-3), (name, group, key)
        one_way, other_way = (
            {(line["alpha"], line["name"]): line["loss"] for line in events(folder, "interpolation")}
            for folder in (alone, tmp_path / name)
        )
        assert len(one_way) == 2 * len(ALPHAS) and other_way == pytest.approx(one_way, rel=1e-4)
