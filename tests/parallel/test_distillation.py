"""A teacher laid out over the ranks: both losses and all gradients are those of the definition in float64, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megarewarm.checkpoint.source import OwnCheckpoint
from megarewarm.config.schema import RunConfig
from megarewarm.model.documents import IGNORE, DocumentRules
from megarewarm.model.fused import Operations
from megarewarm.model.transformer import Transformer
from megarewarm.parallel.placement import TensorSlice
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.setup import build
from megarewarm.training.start import inputs
from megarewarm.training.start.plan import make_plan
from megarewarm.training.trainer import train
from tests.support.distributed import run_ranks
from tests.support.family_shapes import shape
from tests.support.tiny import config, events, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))
FUSED = Operations(norms="triton", gelu="triton", attention="sdpa", loss="reference")
DOCUMENTS = {"eod": 5, "reset_at_eod": True, "mask_eod_loss": True}
NEOX: dict[str, Any] = {"num_layers": 3, "hidden_size": 16, "num_heads": 4, "rotary_fraction": 0.5, "vocab_size": 67}
TEACHERS: dict[str, dict[str, Any]] = {
    "wide": NEOX | {"num_layers": 5, "hidden_size": 24, "rotary_fraction": 1.0, "tie_embeddings": True},
    "deep": NEOX | {"num_layers": 6},
    "llama": shape("qwen3", 5),
    "narrow_llama": shape("mistral", 7, hidden_size=16, head_dim=4),
    "tied_llama": shape("mistral", 5),
}
FIVE = NEOX | {"num_layers": 5}
TIED = {"tie_embeddings": True}
SEQUENCE = {"tensor": 2, "sequence": True}
VEE = {"pipeline": 2, "schedule": "zero_bubble"}

# name -> (parallel, the model, the teacher, kind, other changes)
Case = tuple[dict[str, Any], dict[str, Any], str, str, dict[str, Any]]
TWO: dict[str, Case] = {
    "data": ({}, NEOX, "wide", "logits", {"data": DOCUMENTS}),
    "tensor": ({"tensor": 2}, NEOX, "wide", "logits", {}),
    "tensor_hidden": ({"tensor": 2}, NEOX, "deep", "hidden", {"data": DOCUMENTS}),
    "sequence": (SEQUENCE, NEOX | TIED, "wide", "logits", {"data": DOCUMENTS}),
    "sequence_hidden": (SEQUENCE, NEOX, "deep", "hidden", {"data": DOCUMENTS}),
    "pipeline": ({"pipeline": 2}, NEOX, "wide", "logits", {"data": DOCUMENTS, "training": {"micro_batch": 3}}),
    "pipeline_hidden": ({"pipeline": 2}, NEOX | TIED, "deep", "hidden", {"training": {"micro_batch": 8}}),
    "interleaved": ({"pipeline": 2, "schedule": "interleaved"}, FIVE, "wide", "logits", {}),
    "zero_bubble": (VEE, FIVE | TIED, "wide", "logits", {"data": DOCUMENTS}),
    "zero_bubble_hidden": (VEE, FIVE, "deep", "hidden", {"fused": True}),
    "zero3": ({"sharding": "zero3"}, NEOX, "wide", "logits", {}),
    "llama_sequence": (SEQUENCE, shape("qwen3", 2), "llama", "logits", {"data": DOCUMENTS}),
    "llama_tensor_hidden": ({"tensor": 2}, shape("mistral", 2), "llama", "hidden", {}),
    "llama_zero_bubble": (VEE, shape("mistral", 4), "tied_llama", "logits", {}),
    "llama_taught_by_neox": ({"tensor": 2}, shape("olmo2", 2), "wide", "hidden", {}),
    "neox_taught_by_llama": ({"pipeline": 2}, NEOX, "narrow_llama", "hidden", {"data": DOCUMENTS}),
}
FOUR: dict[str, Case] = {
    "sequence_pipeline": (SEQUENCE | {"pipeline": 2}, NEOX | TIED, "wide", "logits", {"data": DOCUMENTS}),
    "sequence_zero_bubble": (SEQUENCE | VEE, FIVE, "deep", "hidden", {"data": DOCUMENTS}),
    "interleaved_tensor": ({"tensor": 2, "pipeline": 2, "schedule": "interleaved"}, FIVE, "wide", "logits", {}),
    "tensor_zero3": ({"tensor": 2, "sharding": "zero3"}, NEOX, "wide", "logits", {"data": DOCUMENTS}),
    "zero_bubble_zero2": (VEE | {"sharding": "zero2"}, FIVE | TIED, "deep", "hidden", {}),
    "pipeline_data": ({"pipeline": 2}, NEOX, "wide", "logits", {"training": {"micro_batch": 1}}),
    "tensor": ({"tensor": 4}, NEOX, "wide", "logits", {}),
    "llama_sequence_interleaved": (
        SEQUENCE | {"pipeline": 2, "schedule": "interleaved"},
        shape("qwen3", 4),
        "llama",
        "logits",
        {"data": DOCUMENTS},
    ),
}
EVERY_TIME = ["tensor", "sequence_hidden", "sequence", "pipeline", "zero_bubble", "llama_sequence", "neox_taught_by_llama"]
WEIGHT = 0.7


def settings(place: Path, name: str, case: Case, **more: Any) -> RunConfig:
    parallel, model, teacher, kind, changes = case
    distill = {"from": str(place / teacher), "kind": kind, "weight": WEIGHT}
    training = {"budget": 4, "global_batch": 8, "micro_batch": 2} | changes.get("training", {}) | more.pop("training", {})
    return config(
        place,
        name=name,
        folder=str(place / name),
        model=model,
        parallel=parallel,
        distill=distill,
        data=changes.get("data", {}),
        training=training,
        **more,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the teachers."""
    folder = tmp_path_factory.mktemp("teachers")
    for name, model in TEACHERS.items():
        train(config(folder, name=name, folder=str(folder / name), model=model, training={"budget": 3}), ALONE, quiet())
    return folder


def _rows() -> np.ndarray[Any, np.dtype[np.int64]]:
    rows = torch.randint(67, (8, 17), generator=torch.Generator().manual_seed(0)).numpy().astype(np.int64)
    rows[:, 6] = DOCUMENTS["eod"]
    return rows


Computed = dict[str, tuple[tuple[int, ...], tuple[int, ...], Any]]


def _compute(ranks: Ranks, place: str, names: list[str], cases: dict[str, Case]) -> dict[str, tuple[list[float], Computed]]:
    """Of each case: the losses of this rank, summed, and by parameter (offsets, whole shape, its part of the gradient)."""
    usual, found = inputs.choose_operations, {}
    for name in names:
        changes = cases[name][4]
        # on a CPU these compute their definitions: the layout is what is tested
        inputs.choose_operations = (lambda *_, **__: (FUSED, [])) if changes.get("fused") else usual
        run = build(make_plan(settings(Path(place), f"run_{name}", cases[name])), ranks)
        run.batches.close()
        share = 8 // run.mesh.layout.data
        mine = _rows()[run.mesh.data_rank * share :][:share]
        run.model.gradients.zero()
        losses = run.model.forward_backward(mine)
        run.model.gradients.reduce()
        parts: Computed = {}
        for parameter, tensor in run.model.parameters.items():
            assert tensor.grad is not None
            whole = run.model.whole(parameter, tensor.grad)
            part = whole if isinstance(whole, TensorSlice) else TensorSlice(whole, (0,) * whole.dim(), tuple(whole.shape))
            parts[parameter] = part.offsets, part.shape, part.local.clone().numpy()
        found[name] = [losses.sum, losses.distilled, losses.targets], parts
    inputs.choose_operations = usual
    return found


def _definition(place: Path, case: Case) -> tuple[list[float], dict[str, Tensor]]:
    """Both losses and all gradients in float64, of models that hold everything."""
    _, model, teacher_name, kind, changes = case
    alone = build(make_plan(settings(place, "alone", ({}, model, teacher_name, kind, changes))), ALONE)
    alone.batches.close()
    student = Transformer(alone.plan.model)
    student.load_state_dict({name: parameter.detach() for name, parameter in alone.model.parameters.items()})
    student.double()
    teacher = OwnCheckpoint(place / teacher_name / "checkpoints" / "step_3").whole_model().double()
    rows = torch.from_numpy(_rows())
    tokens, targets, starts = rows[:, :-1], rows[:, 1:], None
    if "data" in changes:
        rules = DocumentRules(DOCUMENTS["eod"], True, True)
        targets, starts = rules.targets(tokens, targets), rules.starts(tokens)
    kept = targets.flatten() != IGNORE
    hidden, taught = student(tokens, starts).flatten(0, 1)[kept], teacher(tokens, starts).flatten(0, 1)[kept].detach()
    logits = F.linear(hidden, student.head)
    cross = F.cross_entropy(logits, targets.flatten()[kept], reduction="sum")
    if kind == "logits":
        q = F.linear(taught, teacher.head).log_softmax(1).detach()
        apart = (q.exp() * (q - logits.log_softmax(1))).sum()
    else:
        apart = (hidden - taught).square().sum() / hidden.shape[1]
    ((cross + WEIGHT * apart) / kept.sum()).backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}
    return [float(cross.detach()), float(apart.detach()), float(kept.sum())], gradients


def _assert_defined(place: Path, world_size: int, names: list[str], cases: dict[str, Case]) -> None:
    found = run_ranks(_compute, world_size, str(place), names, cases, timeout=600)
    for name in names:
        losses, gradients = _definition(place, cases[name])
        summed = [sum(each[name][0][i] for each in found) for i in range(3)]
        assert summed == pytest.approx(losses, rel=2e-6), name
        assert losses[1] > 0.5, "the teacher is another model"
        for parameter, wanted in gradients.items():
            whole = torch.full(wanted.shape, torch.nan, dtype=torch.float64)
            for each in found:
                if parameter in each[name][1]:
                    offsets, shape_, part = each[name][1][parameter]
                    local = torch.from_numpy(part).double()
                    TensorSlice(local, offsets, shape_).of(whole).copy_(local)
            scale = float(wanted.abs().max())
            difference = float((whole - wanted).abs().max())
            assert difference <= 5e-6 * scale + 1e-9, f"{name} {parameter}: {difference:.1e} of {scale:.1e}"


def test_losses_and_gradients_of_two_ranks_are_the_definitions(place: Path) -> None:
    _assert_defined(place, 2, EVERY_TIME, TWO)


@pytest.mark.slow
def test_so_are_those_of_all_other_layouts_of_two(place: Path) -> None:
    _assert_defined(place, 2, [name for name in TWO if name not in EVERY_TIME], TWO)


@pytest.mark.slow
def test_so_are_those_of_four_ranks(place: Path) -> None:
    _assert_defined(place, 4, list(FOUR), FOUR)


def test_so_are_those_of_one_process(place: Path) -> None:
    names = ["data", "sequence_hidden", "llama_sequence", "neox_taught_by_llama"]
    cases: dict[str, Case] = {name: ({}, *TWO[name][1:]) for name in names}
    found = _compute(ALONE, str(place), names, cases)
    for name in names:
        losses, gradients = _definition(place, cases[name])
        assert found[name][0] == pytest.approx(losses, rel=2e-6)
        for parameter, wanted in gradients.items():
            local = torch.from_numpy(found[name][1][parameter][2]).double()
            torch.testing.assert_close(local, wanted, rtol=0, atol=5e-6 * float(wanted.abs().max()) + 1e-9)


# ---- runs --------------------------------------------------------------------------------------------------------------


def _losses(folder: Path) -> dict[str, list[float]]:
    lines = events(folder, "train")
    return {key: [line[key] for line in lines] for key in ("loss", "distill_loss", "grad_norm")}


def _train(ranks: Ranks, place: str, names: list[str], more: dict[str, Any]) -> None:
    for name in names:
        train(settings(Path(place), name, TWO[name], **more), ranks, quiet())


@pytest.mark.slow
def test_low_precision_stays_near_fp32(place: Path) -> None:
    names = ["sequence", "pipeline", "sequence_hidden", "zero_bubble_hidden", "zero3"]
    run_ranks(_train, 2, str(place), names, {"training": {"precision": "bf16"}, "schedule": {"max_lr": 1e-3}}, timeout=300)
    for name in names:
        _, *rest = TWO[name]
        alone = settings(place, f"{name}_alone", ({}, *rest), schedule={"max_lr": 1e-3})  # type: ignore[arg-type]
        train(alone, ALONE, quiet())
        exact, low = _losses(place / f"{name}_alone"), _losses(place / name)
        for key, values in exact.items():
            assert low[key] == pytest.approx(values, rel=0.03) and low[key] != values, (name, key)


def test_losses_of_single_rows_add_up_in_a_pipeline(place: Path) -> None:
    for rows, whole in run_ranks(_rows_and_sum, 2, str(place)):
        assert len(rows) == 8 and sum(rows) == pytest.approx(whole, rel=1e-6)


def _rows_and_sum(ranks: Ranks, place: str) -> tuple[list[float], float]:
    run = build(make_plan(settings(Path(place), "rows", TWO["pipeline"])), ranks)
    run.batches.close()
    losses = run.model.forward_backward(_rows(), per_row=True)
    assert losses.rows is not None
    return losses.rows, losses.sum


def _whole_rows(ranks: Ranks, place: str, names: list[str]) -> list[list[float]]:
    """Of each case, the losses of single rows as ``forward_backward`` differentiates them, and their sum in training."""
    found = []
    for name in names:
        run = build(make_plan(settings(Path(place), f"rows_{name}", TWO[name])), ranks)
        run.batches.close()
        losses = run.model.forward_backward(_rows())
        found.append([losses.sum + WEIGHT * losses.distilled, *run.model.row_losses(_rows(), 8, 2)])
    return found


def test_losses_of_single_rows_have_the_teachers_term_in_tensor_ranks_and_pipelines(place: Path) -> None:
    names = ["tensor", "sequence_hidden", "pipeline", "zero_bubble_hidden"]
    found = run_ranks(_whole_rows, 2, str(place), names)
    for i, name in enumerate(names):
        whole, *rows = (sum(each) for each in zip(*(rank[i] for rank in found), strict=True))
        assert len(rows) == 8 and min(rows) > 0 and sum(rows) == pytest.approx(whole, rel=1e-6), name
