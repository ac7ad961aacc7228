"""Distillation from the start checkpoint: its gradients, its runs on several ranks, what a resumed run makes of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from megarewarm.checkpoint.source import OwnCheckpoint
from megarewarm.config.load import dump
from megarewarm.config.schema import RunConfig
from megarewarm.errors import UserError
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.output.run_folder import RunFolder
from megarewarm.training.setup import build
from megarewarm.training.start.inputs import open_inputs
from megarewarm.training.start.plan import make_plan
from megarewarm.training.trainer import train
from tests.parallel.test_layouts import assert_same_run
from tests.support.distributed import run_ranks
from tests.support.tiny import config, events, quiet
from tests.training.test_resume import ALONE

KINDS = ("logits", "hidden")
HEADS = {"num_heads": 4}  # as assert_same_run expects


def settings(place: Path, name: str, kind: str | None, **changes: Any) -> RunConfig:
    distill = None if kind is None else {"kind": kind, "weight": 0.5}
    usual = {"start": {"from": str(place / "up")}, "model": HEADS, "distill": distill, "checkpoint": {"every": 5}}
    return config(place, name=name, folder=str(place / name), **usual | changes)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    data = {"train": [{"path": str(folder / "old"), "max_epochs": 9}]}
    train(config(folder, name="up", folder=str(folder / "up"), data=data, model=HEADS), ALONE, quiet())
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_two_losses_written_out(place: Path, kind: str) -> None:
    run = build(make_plan(settings(place, f"grad_{kind}", kind)), ALONE)
    teacher = OwnCheckpoint(place / "up" / "checkpoints" / "step_20").whole_model()
    random = torch.Generator().manual_seed(0)
    for parameter in run.model.parameters.values():  # away from the teacher
        parameter.data.add_(torch.randn(parameter.shape, generator=random), alpha=0.02)
    student = OwnCheckpoint(place / "up" / "checkpoints" / "step_20").whole_model()
    student.load_state_dict(dict(run.model.parameters))
    rows = torch.randint(64, (8, 17), generator=random)
    losses = run.model.forward_backward(rows.numpy().astype(np.int64))
    inputs, targets = rows[:, :-1], rows[:, 1:].flatten()
    logits, wanted = student.logits(inputs).flatten(0, 1), teacher.logits(inputs).flatten(0, 1).detach()
    if kind == "logits":
        term = F.kl_div(logits.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean")
    else:
        term = F.mse_loss(student(inputs), teacher(inputs).detach())
    (F.cross_entropy(logits, targets) + 0.5 * term).backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(run.model.parameters[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)
    assert losses.distilled / rows[:, 1:].numel() == pytest.approx(float(term), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_begins_at_its_teacher_stays_nearer_to_it_and_resumes_to_the_bit(place: Path, kind: str) -> None:
    whole = settings(place, kind, kind)
    train(whole, ALONE, quiet())
    train(settings(place, "plain", None), ALONE, quiet())
    terms = [line["distill_loss"] for line in events(place / kind, "train")]
    assert terms[0] == pytest.approx(0, abs=1e-6) and terms[-1] > 1e-3
    assert "distill_loss" not in events(place / "plain", "train")[0]
    # the loss that is logged, and that of validation, are cross entropies: at the start both runs have the same
    first, plain = (events(place / name, "train")[0]["loss"] for name in (kind, "plain"))
    assert first == pytest.approx(plain, rel=1e-6)
    forgotten = [[e["loss"] for e in events(place / name, "eval") if e["name"] == "old"][-1] for name in (kind, "plain")]
    assert forgotten[0] < forgotten[1]
    cut = settings(place, f"{kind}_cut", kind)
    folder = RunFolder(Path(cut.run_folder))
    shutil.copytree(place / kind / "checkpoints" / "step_10", folder.checkpoints / "step_10")
    folder.config_file.write_text(dump(cut))
    train(cut, ALONE, quiet())
    one, two = (
        OwnCheckpoint(place / name / "checkpoints" / "step_20").whole_model().state_dict() for name in (kind, f"{kind}_cut")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def _train(ranks: Ranks, place: str, names: dict[str, dict[str, Any]]) -> None:
    for name, (kind, parallel) in names.items():
        train(settings(Path(place), name, kind, parallel=parallel), ranks, quiet())


def test_data_parallel_ranks_in_every_sharding_compute_the_run_of_one(place: Path) -> None:
    layouts = {f"two_{kind}_{s}": (kind, {"sharding": s}) for kind in KINDS for s in ("none", "zero2", "zero3")}
    run_ranks(_train, 2, str(place), layouts, timeout=300)
    for kind in KINDS:
        train(settings(place, f"one_{kind}", kind), ALONE, quiet())
        for sharding in ("none", "zero2", "zero3"):
            assert_same_run(place / f"two_{kind}_{sharding}", place / f"one_{kind}")
            terms = [
                [line["distill_loss"] for line in events(place / name, "train")][1:]
                for name in (f"two_{kind}_{sharding}", f"one_{kind}")
            ]
            assert terms[0] == pytest.approx(terms[1], rel=1e-3)


@pytest.mark.parametrize("intent", ["rewarm", "resume", "branch"])
def test_who_goes_on_elsewhere_is_told_whom_the_teacher_is(place: Path, intent: str) -> None:
    start = {"from": str(place / "up/checkpoints/step_10"), "intent": intent}
    plan = make_plan(
        settings(
            place, f"told_{intent}", "logits", start=start, data={"train": [{"path": str(place / "old"), "max_epochs": 9}]}
        )
    )
    told = [note for note in open_inputs(plan, 1, torch.device("cpu")).notes if "the teacher is" in note]
    assert len(told) == (intent != "rewarm") and all(str(place / "up/checkpoints/step_10") in note for note in told)


def test_what_can_not_be_distilled_is_refused(place: Path, tmp_path: Path) -> None:
    for changes, told in (
        ({"parallel": {"tensor": 2}}, "data-parallel ranks"),
        ({"parallel": {"pipeline": 2}}, "data-parallel ranks"),
        ({"start": {"from": None}}, "needs 'start.from'"),
    ):
        with pytest.raises((UserError, ValidationError), match=told):
            settings(place, "no", "logits", **changes)
    lost = settings(tmp_path, "lost", "logits")
    data = {"train": [{"path": str(tmp_path / "old"), "max_epochs": 9}]}
    parent: dict[str, Any] = {"data": data, "model": HEADS, "training": {"budget": 2}}
    train(config(tmp_path, name="up", folder=str(tmp_path / "up"), **parent), ALONE, quiet())
    train(lost, ALONE, quiet())
    shutil.rmtree(tmp_path / "lost" / "checkpoints" / "step_20")
    shutil.rmtree(tmp_path / "up")
    with pytest.raises(UserError, match="distill: the start checkpoint is the teacher and can't be read"):
        train(lost, ALONE, quiet())
