"""Distillation from the start checkpoint: its gradients, its runs on several ranks, what a resumed run makes of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
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


@pytest.mark.slow
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


def _teacher(place: Path, name: str, model: dict[str, Any], **changes: Any) -> str:
    """A run that others are taught by."""
    train(config(place, name=name, folder=str(place / name), model=model, **changes), ALONE, quiet())
    return str(place / name)


def test_a_teacher_that_is_the_start_teaches_what_the_start_does_bit_for_bit(place: Path) -> None:
    for name, teacher in (("by_start", None), ("by_name", str(place / "up/checkpoints/step_20"))):
        train(settings(place, name, None, distill={"from": teacher, "kind": "logits", "weight": 0.5}), ALONE, quiet())
    one, two = (OwnCheckpoint(place / name / "checkpoints/step_20") for name in ("by_start", "by_name"))
    weights = [checkpoint.whole_model().state_dict() for checkpoint in (one, two)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    terms = [[line["distill_loss"] for line in events(place / name, "train")] for name in ("by_start", "by_name")]
    assert terms[0] == terms[1]
    for checkpoint in (one, two):
        told = checkpoint.lineage.stages[-1].taught_by
        assert told is not None and told.name.startswith(str(place / "up")) and (told.kind, told.weight) == ("logits", 0.5)
        assert f"taught by {told.name} (logits, weight 0.5)" in checkpoint.lineage.lines()[-1]
    assert one.lineage.stages[-1].taught_by.identity == two.lineage.stages[-1].taught_by.identity  # type: ignore[union-attr]
    assert one.lineage.stages[0].taught_by is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_its_teacher_has_no_distance(place: Path, kind: str) -> None:
    run = build(make_plan(settings(place, f"equal_{kind}", None, distill={"from": str(place / "up"), "kind": kind})), ALONE)
    run.batches.close()
    losses = run.model.forward_backward(np.arange(8 * 17, dtype=np.int64).reshape(8, 17) % 64)
    assert losses.distilled == pytest.approx(0, abs=1e-5 if kind == "logits" else 0)


def test_a_run_from_scratch_learns_from_a_deeper_and_wider_teacher_in_any_format(place: Path) -> None:
    teacher = _teacher(place, "large", HEADS | {"num_layers": 3, "hidden_size": 64}, export={"huggingface": True})
    for name, folder in (("own", teacher), ("exported", f"{teacher}/huggingface")):
        distill = {"from": folder, "kind": "logits", "weight": 2.0}
        train(settings(place, name, None, start={"from": None}, distill=distill), ALONE, quiet())
    terms = {name: [line["distill_loss"] for line in events(place / name, "train")] for name in ("own", "exported")}
    assert terms["own"] == pytest.approx(terms["exported"], rel=1e-5)
    train(settings(place, "untaught", None, start={"from": None}), ALONE, quiet())
    # of the same first weights and data, the taught one is nearer to its teacher
    rows = torch.randint(64, (16, 16), generator=torch.Generator().manual_seed(1))
    far = {}
    wanted = OwnCheckpoint(place / "large/checkpoints/step_20").whole_model().logits(rows).flatten(0, 1).log_softmax(1)
    for name in ("own", "untaught"):
        found = OwnCheckpoint(place / name / "checkpoints/step_20").whole_model().logits(rows).flatten(0, 1).log_softmax(1)
        far[name] = float(F.kl_div(found, wanted, log_target=True, reduction="batchmean").detach())
    assert far["own"] < 0.9 * far["untaught"]


def test_a_resumed_run_reads_the_same_teacher_and_refuses_another(tmp_path: Path) -> None:
    config(tmp_path)
    teacher = _teacher(tmp_path, "teacher", HEADS, training={"budget": 6})
    whole = settings(tmp_path, "whole", None, start={"from": None}, distill={"from": teacher, "weight": 1.0})
    train(whole, ALONE, quiet())
    kept = (tmp_path / "whole/checkpoints/step_20").rename(tmp_path / "kept")
    train(whole, ALONE, quiet())
    one, two = (OwnCheckpoint(folder).whole_model().state_dict() for folder in (kept, tmp_path / "whole/checkpoints/step_20"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    # complete: it needs its teacher no more
    shutil.move(teacher, tmp_path / "away")
    assert train(whole, ALONE, quiet()).exit_code == 0
    shutil.rmtree(tmp_path / "whole/checkpoints/step_20")
    with pytest.raises(UserError, match=r"distill\.from: .*teacher: no such folder"):
        train(whole, ALONE, quiet())
    _teacher(tmp_path, "teacher", HEADS, training={"budget": 6, "seed": 5})
    with pytest.raises(UserError, match=r"distill\.from: .*teacher.* holds other weights than those that have taught whole"):
        train(whole, ALONE, quiet())
    # the same weights in another format are the same teacher
    shutil.rmtree(teacher)
    shutil.copytree(tmp_path / "away/checkpoints/step_6", teacher)
    assert train(whole, ALONE, quiet()).exit_code == 0
    changed = settings(tmp_path, "whole", None, start={"from": None}, distill={"from": str(tmp_path / "away"), "weight": 1.0})
    with pytest.raises(UserError, match=r"distill\.from was .*teacher"):
        train(changed, ALONE, quiet())


def test_a_layout_changes_no_identity(place: Path) -> None:
    teacher = _teacher(place, "five", HEADS | {"num_layers": 5, "vocab_size": 64})
    start: dict[str, Any] = {"start": {"from": None}, "distill": {"from": teacher, "kind": "logits"}}
    train(settings(place, "first_half", None, **start), ALONE, quiet())
    shutil.rmtree(place / "first_half/checkpoints/step_20")
    run_ranks(_go_on, 2, str(place), start)
    terms = [line["distill_loss"] for line in events(place / "first_half", "train")]
    assert terms[:20][-5:] == pytest.approx(terms[20:][-5:], rel=1e-4)


def _go_on(ranks: Ranks, place: str, start: dict[str, Any]) -> None:
    train(settings(Path(place), "first_half", None, parallel={"pipeline": 2}, **start), ranks, quiet())


def test_rows_of_a_vocabulary_that_no_token_uses_may_differ(place: Path) -> None:
    """The teacher's predictions are then of the ids that both have."""
    teacher = _teacher(place, "padded", HEADS | {"vocab_size": 70})
    tokenizer = place / "few.json"
    words = {f"w{i}": i for i in range(60)} | {"<eos>": 60}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    made.add_special_tokens(["<eos>"])
    made.save(str(tokenizer))
    distill = {"distill": {"from": teacher, "kind": "logits"}}
    with pytest.raises(UserError, match=r"padded.* has a vocabulary of 70 ids, the model one of 64, and it has no tokenizer"):
        make_plan(settings(place, "rows", None, **distill))
    config_file = place / "padded/config.yaml"
    config_file.write_text(config_file.read_text().replace("tokenizer: null", f"tokenizer: {tokenizer}"))
    run = build(make_plan(settings(place, "rows", None, **distill)), ALONE)
    run.batches.close()
    assert any("has 70 rows for ids, the model 64" in note for note in run.notes)
    rows = torch.randint(61, (8, 17), generator=torch.Generator().manual_seed(2))
    losses = run.model.forward_backward(rows.numpy().astype(np.int64))
    student, model = (OwnCheckpoint(place / name / "checkpoints/step_20").whole_model() for name in ("up", "padded"))
    log_q = (model(rows[:, :-1]) @ model.head[:64].T).log_softmax(-1)
    log_p = (student(rows[:, :-1]) @ student.head.T).log_softmax(-1)
    wanted = float((log_q.exp() * (log_q - log_p)).sum().detach())
    assert losses.distilled == pytest.approx(wanted, rel=1e-5)


def test_what_can_not_be_distilled_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises((UserError, ValidationError), match=r"distill needs a teacher: give 'distill\.from', or 'start\.from'"):
        settings(place, "no", "logits", start={"from": None})
    lost = settings(tmp_path, "lost", "logits")
    data = {"train": [{"path": str(tmp_path / "old"), "max_epochs": 9}]}
    parent: dict[str, Any] = {"data": data, "model": HEADS, "training": {"budget": 2}}
    train(config(tmp_path, name="up", folder=str(tmp_path / "up"), **parent), ALONE, quiet())
    train(lost, ALONE, quiet())
    shutil.rmtree(tmp_path / "lost" / "checkpoints" / "step_20")
    shutil.rmtree(tmp_path / "up")
    with pytest.raises(UserError, match="distill: the start checkpoint is the teacher and can't be read"):
        train(lost, ALONE, quiet())
