"""Muon against its definition in float64, against torch.optim.Muon, and against itself in every layout of the ranks."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from megarewarm.checkpoint.convert import ConvertOptions, convert
from megarewarm.checkpoint.merge import Merge, merge
from megarewarm.checkpoint.own import store
from megarewarm.checkpoint.source import OwnCheckpoint, open_checkpoint
from megarewarm.config.execution import OptimizerConfig
from megarewarm.errors import UserError
from megarewarm.model.interleaved import Interleaved
from megarewarm.optimizers.muon import orthogonal_each, orthogonalised
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.run import RNG
from megarewarm.training.setup import build
from megarewarm.training.start.plan import make_plan
from megarewarm.training.step import training_step
from megarewarm.training.trainer import train
from tests.support.distributed import run_ranks
from tests.support.family_shapes import shape
from tests.support.tiny import config, events, quiet

MODEL = dict(num_layers=3, hidden_size=24, num_heads=6, ffn_size=36, vocab_size=67, rotary_fraction=0.5, max_positions=64)
ALONE = Ranks(0, 1, torch.device("cpu"))
ADAM = {"kind": "adamw", "momentum": 0.95}
MUON = {"kind": "muon", "eps": 1e-4, "weight_decay": 0.05, "momentum": 0.9}


def run_config(place: Path, **changes: Any) -> Any:
    base: dict[str, Any] = {"model": MODEL, "optimizer": MUON, "training": {"budget": 4, "global_batch": 6, "micro_batch": 1}}
    return config(place, **{**base, **changes})


def newton_schulz(matrix: Tensor, steps: int) -> Tensor:
    """By singular values, which the odd polynomial maps one by one (float64)."""
    u, sigma, v = torch.linalg.svd(matrix / (matrix.norm() + 1e-7), full_matrices=False)
    for _ in range(steps):
        sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
    return u @ torch.diag(sigma) @ v


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**31))
@examples(max_examples=30, deadline=None)
def test_the_iteration_is_a_polynomial_of_the_singular_values(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(2, rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = orthogonalised(matrix, 5)
    for one, whole in zip(found, matrix, strict=True):
        assert torch.allclose(one, newton_schulz(whole, 5), atol=1e-5)


def test_steps_are_those_of_the_definition(tmp_path: Path) -> None:
    """Momentum, orthogonal directions of q, k and v apart, scale and decay, in float64; the rest is AdamW's."""
    settings = run_config(tmp_path)
    run = build(make_plan(settings), ALONE)
    weights = {name: p.detach().double() for name, p in run.model.parameters.items()}
    momentum = {name: torch.zeros_like(w) for name, w in weights.items() if run.model.cards[name].is_matrix}
    assert len(momentum) == 4 * 3
    gradients: dict[str, Tensor] = {}
    step = run.optimizer.step

    def watched(lr: float, flat: Any = None, scale: float = 1.0) -> None:
        gradients.update({name: p.grad.double() * scale for name, p in run.model.parameters.items() if p.grad is not None})
        step(lr, flat, scale)

    run.optimizer.step = watched  # type: ignore[assignment, method-assign]
    for number in range(1, 4):
        lr = run.plan.lr(number)
        training_step(run, lr)
        for name, held in momentum.items():
            gradient, weight = gradients[name], weights[name]
            held.mul_(0.9).add_(gradient, alpha=0.1)
            direction = 0.1 * gradient + 0.9 * held
            if name.endswith("query_key_value.weight"):  # rows: head by head q, k, v of 4 channels
                moved = torch.empty_like(direction)
                for third in range(3):
                    rows = [head * 12 + third * 4 + i for head in range(6) for i in range(4)]
                    moved[rows] = newton_schulz(direction[rows], 5) * (0.2 * math.sqrt(24))
            else:
                moved = newton_schulz(direction, 5) * (0.2 * math.sqrt(max(direction.shape)))
            weights[name] = weight - lr * 0.05 * weight - lr * moved
            assert torch.allclose(run.model.parameters[name].double(), weights[name], atol=2e-5), (number, name)
            weights[name] = run.model.parameters[name].detach().double()
    run.batches.close()


@given(st.integers(1, 6), st.integers(2, 5), st.integers(2, 30), st.integers(0, 2**31))
@examples(max_examples=20, deadline=None)
def test_queries_keys_and_values_of_equal_size_move_in_one_batch(heads: int, dim: int, columns: int, seed: int) -> None:
    """To the bit as a batch of three, which earlier versions computed."""
    qkv = torch.randn(3 * heads * dim, columns, generator=torch.Generator().manual_seed(seed))
    rows = qkv.view(heads, 3, dim, columns).transpose(0, 1)
    three = orthogonalised(rows.flatten(1, 2), 5)
    wanted = three.view(rows.shape).transpose(0, 1).reshape(qkv.shape) * (0.2 * math.sqrt(max(three.shape[1:])))
    interleaved = Interleaved((1, 1, 1), dim)
    assert torch.equal(interleaved.join(orthogonal_each(interleaved.split(qkv), 5)), wanted)


@pytest.mark.parametrize("name", ["llama", "olmo2"])
def test_steps_of_families_are_those_of_the_definition(tmp_path: Path, name: str) -> None:
    """Queries, keys, values, gate and up are a matrix each, in float64; norms move by AdamW."""
    settings = run_config(tmp_path, model=shape(name, 2))
    run = build(make_plan(settings), ALONE)
    heads, d = settings.model.num_heads // 2, settings.model.head_width
    lr = run.plan.lr(1)
    before = {key: p.detach().double() for key, p in run.model.parameters.items()}
    momentum = {key: held for (what, key), held in run.optimizer.state().items() if what == "momentum"}
    assert len(momentum) == 4 * 2
    training_step(run, lr)
    for key, held in momentum.items():
        direction = (0.1 + 0.9 * 0.1) / 0.1 * held.double()  # the momentum of one gradient g is 0.1 g
        index = torch.arange(len(direction))
        if key.endswith("query_key_value.weight"):  # rows: key head by key head 2 queries, a key and a value of d channels
            kind = index // d % (heads + 2) - (heads - 1)
            parts = [index[kind <= 0], index[kind == 1], index[kind == 2]]
        else:
            parts = [index[0::2], index[1::2]] if key.endswith("gate_up.weight") else [index]
        moved = torch.empty_like(direction)
        for rows in parts:
            moved[rows] = newton_schulz(direction[rows], 5) * (0.2 * math.sqrt(max(direction[rows].shape)))
        wanted = before[key] * (1 - lr * 0.05) - lr * moved
        torch.testing.assert_close(run.model.parameters[key].double(), wanted, rtol=0, atol=2e-5, msg=key)
    run.batches.close()


def test_a_matrix_moves_as_with_torchs_own(tmp_path: Path) -> None:
    """torch.optim.Muon iterates in bfloat16, so only about the same."""
    run = build(make_plan(run_config(tmp_path)), ALONE)
    name = "layers.1.mlp.dense_h_to_4h.weight"
    theirs = torch.nn.Parameter(run.model.parameters[name].detach().clone())
    peer = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.05, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        run.model.gradients.zero()
        for parameter in run.model.parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        grad = run.model.parameters[name].grad
        assert grad is not None
        theirs.grad = grad.clone()
        before = theirs.detach().clone()
        run.optimizer.step(0.01, run.model.gradients, 1.0)
        peer.step()
        ours, peers = run.model.parameters[name].detach(), theirs.detach()
        assert float((ours - peers).norm() / (peers - before).norm()) < 0.05
        with torch.no_grad():
            theirs.copy_(run.model.parameters[name])
    run.batches.close()


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data": (3, {}),
    "zero2_uneven": (3, {"sharding": "zero2"}),
    "tensor": (2, {"tensor": 2}),
    "pipeline": (2, {"pipeline": 2}),
    "zero3_of_two_replicas": (4, {"sharding": "zero3", "shard_ranks": 2}),
    "tensor_sequence_zero2": (4, {"tensor": 2, "sequence": True, "sharding": "zero2"}),
    "pipeline_zero2": (4, {"pipeline": 2, "sharding": "zero2"}),
}


def settings_of(place: Path, name: str, parallel: dict[str, Any], model: dict[str, Any] = MODEL) -> Any:
    return run_config(
        place,
        model=model,
        name=name,
        folder=str(place / name),
        parallel=parallel,
        training={"budget": 4, "global_batch": 12, "micro_batch": 1},
        evaluation={"every": 2},
        checkpoint={"every": 2},
        logging={"dynamics": 1},
    )


def _train_all(ranks: Ranks, place: str, names: list[str], model: dict[str, Any] = MODEL) -> None:
    for name in names:
        train(settings_of(Path(place), name, LAYOUTS[name][1], model), ranks, quiet())


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    shapes = {name: shape for name, (shape, _) in store.stored_tensors(checkpoint).items() if name != RNG}
    held = {name: torch.empty(shape) for name, shape in shapes.items()}
    store.load(checkpoint, dict(held), alone=True)
    return held


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow), 4])
def test_every_layout_trains_saves_and_resumes_as_one_process(tmp_path: Path, ranks: int) -> None:
    """Losses, weights, momentum, moments, dynamics; a run of one process gone on with on several ranks, too."""
    check_layouts(tmp_path, ranks, [name for name, (count, _) in LAYOUTS.items() if count == ranks], MODEL)


@pytest.mark.parametrize(
    ("model", "ranks", "names"),
    [
        pytest.param("olmo2", 2, ["tensor", "pipeline"], marks=pytest.mark.slow),
        pytest.param("qwen3", 4, ["zero3_of_two_replicas", "tensor_sequence_zero2", "pipeline_zero2"], marks=pytest.mark.slow),
        pytest.param("llama_biases", 4, ["tensor_sequence_zero2"], marks=pytest.mark.slow),
    ],
)
def test_so_do_families(tmp_path: Path, model: str, ranks: int, names: list[str]) -> None:
    check_layouts(tmp_path, ranks, names, shape(model, 3))


def check_layouts(tmp_path: Path, ranks: int, names: list[str], model: dict[str, Any]) -> None:
    """The layouts ``names`` of so many ranks against one process, from the start and from its middle."""
    alone = train(settings_of(tmp_path, "alone", {}, model), ALONE, quiet()).folder
    run_ranks(_train_all, ranks, str(tmp_path), names, model, timeout=300)
    whole = {name: tmp_path / name for name in names}
    for name in names:
        (tmp_path / name).rename(tmp_path / f"whole_{name}")
        whole[name] = tmp_path / f"whole_{name}"
        shutil.copytree(alone, tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "step_4")
        text = (tmp_path / name / "config.yaml").read_text()
        (tmp_path / name / "config.yaml").write_text(text.replace("alone", name))
    run_ranks(_train_all, ranks, str(tmp_path), names, model, timeout=300)
    wanted = tensors_of(alone / "checkpoints" / "step_4")
    assert "optimizer.momentum.layers.0.attention.dense.weight" in wanted
    assert "optimizer.exp_avg.layers.0.attention.dense.weight" not in wanted
    for name in names:
        for folder in (whole[name], tmp_path / name):
            for event in ("train", "eval"):
                one, other = (
                    {(line["step"], line.get("name")): line["loss"] for line in events(run, event)} for run in (alone, folder)
                )
                assert other == pytest.approx(one, rel=1e-5), (name, event)
            found = tensors_of(folder / "checkpoints" / "step_4")
            assert found.keys() == wanted.keys()
            for key, tensor in wanted.items():
                assert torch.allclose(found[key], tensor, rtol=1e-3, atol=2e-5), (name, folder.name, key)
        for line, its in zip(events(alone, "dynamics"), events(whole[name], "dynamics"), strict=True):
            for group, numbers in line["groups"].items():
                assert its["groups"][group] == pytest.approx(numbers, rel=2e-3), (name, group)


def test_another_optimizer_is_said_and_its_state_is_not_kept(tmp_path: Path) -> None:
    adam = train(
        run_config(tmp_path, name="adam", folder=str(tmp_path / "adam"), optimizer=ADAM),
        ALONE,
        quiet(),
    ).folder
    start = {"from": str(adam)}
    changes: dict[str, Any] = {"name": "muon", "folder": str(tmp_path / "muon"), "start": start}
    with pytest.raises(UserError, match=r"start\.moments: 'keep' can't be honoured, the checkpoint's are those of adamw"):
        make_plan(run_config(tmp_path, **(changes | {"start": {**start, "intent": "branch"}})))
    run = build(make_plan(run_config(tmp_path, **changes)), ALONE)
    assert any("was trained with adamw: a change of optimizer" in note for note in run.notes)
    run.batches.close()
    out = quiet()
    train(run_config(tmp_path, **changes), ALONE, out)
    back = changes | {"name": "back", "folder": str(tmp_path / "back"), "start": {"from": str(tmp_path / "muon")}}
    run = build(make_plan(run_config(tmp_path, optimizer=ADAM, **back)), ALONE)
    assert any("was trained with adamw, then muon" in note for note in run.notes)
    run.batches.close()
    again = OwnCheckpoint(tmp_path / "muon" / "checkpoints" / "step_4")
    assert again.state.optimizer == "muon"
    convert(again, tmp_path / "copy", ConvertOptions("megarewarm"))
    kept, copied = tensors_of(again.folder), tensors_of(tmp_path / "copy")
    assert kept.keys() == copied.keys() and all(torch.equal(kept[key], copied[key]) for key in kept)


@pytest.mark.parametrize("form", ["hf", "megarewarm"])
def test_weights_alone_say_by_which_optimizer_they_were_trained(tmp_path: Path, form: str) -> None:
    folder = train(run_config(tmp_path), ALONE, quiet()).folder
    opened = open_checkpoint(str(folder))
    assert opened.lineage.optimizers == ["muon"] and ", muon, lr up to" in opened.lineage.lines()[0]
    if form == "megarewarm":  # weights only, whose history is the only thing that says it
        merge(Merge([str(folder)] * 2, [0.5, 0.5], "mean"), tmp_path / "copy", ConvertOptions(form))
    else:
        convert(opened, tmp_path / "copy", ConvertOptions(form))
    source = open_checkpoint(str(tmp_path / "copy"))
    assert source.training is None and source.lineage.optimizers == ["muon"]
    start = {"name": "on", "folder": str(tmp_path / "on"), "start": {"from": str(tmp_path / "copy")}}
    for optimizer, said in ((ADAM, True), (MUON, False)):
        run = build(make_plan(run_config(tmp_path, optimizer=optimizer, **start)), ALONE)
        assert any("copy was trained with muon: a change of optimizer" in note for note in run.notes) is said
        run.batches.close()


def test_keys_of_muon_without_it_are_refused() -> None:
    with pytest.raises(ValidationError, match="are of kind 'muon'"):
        OptimizerConfig(momentum=0.9)
