"""The arithmetic of memory and traffic against tensors and collectives that really are there."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from megarewarm.config.load import merge, validate
from megarewarm.config.schema import RunConfig
from megarewarm.layout.cluster import rank_layouts
from megarewarm.layout.gpus import GPUS
from megarewarm.layout.memory import Work, memory_of, parts, traffic_of
from megarewarm.parallel.fit import check_fit
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.run import Run
from megarewarm.training.setup import build
from megarewarm.training.start.plan import make_plan
from megarewarm.training.step import training_step
from megarewarm.training.trainer import train
from tests.support.distributed import run_ranks
from tests.support.family_shapes import SHAPES, larger
from tests.support.tiny import config, mapping, quiet
from tests.support.wire import Wire

ALONE = Ranks(0, 1, torch.device("cpu"))
FAMILIES = {name: larger(name, layers=4) for name in SHAPES}
CLUSTER: dict[str, Any] = {
    "model": {"num_layers": 32, "hidden_size": 4096, "num_heads": 32, "vocab_size": 50432, "max_positions": 2048},
    "data": {"sequence_length": 2048},
    "training": {"global_batch": 512, "micro_batch": 1},
}
SIZES: dict[str, dict[str, Any]] = {
    "small": {"num_layers": 4, "hidden_size": 64, "num_heads": 4, "vocab_size": 128},
    "wide": {"num_layers": 4, "hidden_size": 192, "num_heads": 4, "vocab_size": 512},
    "tied": {"num_layers": 4, "hidden_size": 64, "num_heads": 4, "vocab_size": 1024, "tie_embeddings": True},
    "deep": {"num_layers": 12, "hidden_size": 96, "num_heads": 4, "vocab_size": 64},
    "sequential": {"num_layers": 4, "hidden_size": 64, "num_heads": 4, "vocab_size": 128, "residual": "sequential"},
    **FAMILIES,
}


OF_TWO: list[dict[str, Any]] = [
    {},
    {"tensor": 2},
    {"tensor": 2, "sequence": True},
    {"pipeline": 2},
    {"pipeline": 2, "schedule": "interleaved"},
    {"pipeline": 2, "schedule": "zero_bubble"},
    {"sharding": "zero2"},
    {"sharding": "zero3"},
]


def _build(
    place: str,
    size: str,
    ranks: Ranks,
    parallel: dict[str, Any],
    micro_batch: int = 4,
    recompute: str = "none",
    kind: str = "adamw",
    kernels: str = "auto",
) -> Run:
    return build(
        make_plan(
            config(
                Path(place),
                folder=f"{place}/run",
                model=SIZES[size],
                training={"micro_batch": micro_batch, "recompute": recompute},
                parallel=parallel,
                optimizer={"kind": kind},
                kernels={"use": kernels},
            )
        ),
        ranks,
    )


def _work(run: Run) -> Work:
    training, kind = run.plan.config.training, run.plan.config.optimizer.kind
    share = training.global_batch // run.mesh.layout.data
    length = run.plan.config.data.sequence_length
    count = -(-share // training.micro_batch_size)
    fused = run.plan.config.kernels.use == "auto"
    return Work(run.plan.model, length, training.micro_batch_size, count, training.recompute, optimizer=kind, fused=fused)


def _measured_memory(run: Run) -> dict[str, float]:
    """Bytes of the tensors at the end of the forward pass of one micro-batch, each storage once."""
    held: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in run.model.parameters.values()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = run.data.rows(0, run.plan.config.training.micro_batch_size)
    run.model.forward_backward(batch)
    gradients = sum(p.grad.nbytes for p in run.model.parameters.values() if p.grad is not None)
    run.model.gradients.zero()
    rows = torch.from_numpy(batch)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = run.model._modules[0](rows[:, :-1])
    held[hidden.untyped_storage().data_ptr()] = hidden.nbytes
    moments = run.optimizer.state().values()
    return {
        "weights": sum(p.nbytes for p in run.model.parameters.values()),
        "gradients": gradients,
        "optimizer": sum(moment.nbytes for moment in moments),
        "activations": sum(held.values()),
    }


def _compare(
    ranks: Ranks, place: str, size: str, parallel: dict[str, Any], recompute: str, kernels: str = "auto"
) -> list[tuple[str, float, float]]:
    run = _build(place, size, ranks, parallel, recompute=recompute, kernels=kernels)
    run.batches.close()
    measured = _measured_memory(run)
    asked, layout = run.plan.config.parallel, run.mesh.layout
    (part,) = parts(_work(run), asked, layout)
    planned = memory_of(part, 0, _work(run), asked, layout)
    activations = planned.activations
    if recompute == "full":  # the plan adds the layer that is being recomputed in the backward pass
        from megarewarm.model.size import activation_bytes

        again: dict[str, Any] = {"layers": 1, "last": False, "fused": _work(run).fused, "checkpointed": True}
        activations -= activation_bytes(run.plan.model, _work(run).tokens, **again)
    return [
        ("weights", planned.weights, measured["weights"]),
        ("gradients", planned.gradients, measured["gradients"]),
        ("optimizer", planned.optimizer, measured["optimizer"]),
        ("activations", activations, measured["activations"]),
    ]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("size", SIZES)
def test_planned_memory_is_there(tmp_path: Path, size: str, recompute: str) -> None:
    for what, planned, measured in _compare(ALONE, str(tmp_path), size, {}, recompute):
        assert planned == pytest.approx(measured, rel=0.1), what


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"tensor": 2, "sequence": True}], ids=str)
def test_planned_memory_of_tensor_ranks_is_there(tmp_path: Path, parallel: dict[str, Any]) -> None:
    config(tmp_path)
    for found in run_ranks(_compare, 2, str(tmp_path), "wide", parallel, "none"):
        for what, planned, measured in found:
            assert planned == pytest.approx(measured, rel=0.1), what


def _compare_families(ranks: Ranks, place: str, sizes: list[str]) -> list[tuple[str, float, float]]:
    found = []
    for size, sequence, kernels in itertools.product(sizes, (False, True), ("auto", "reference")):
        for what, planned, measured in _compare(ranks, place, size, {"tensor": 2, "sequence": sequence}, "none", kernels):
            found.append((f"{size}, sequence {sequence}, {kernels}: {what}", planned, measured))
    return found


def _check_families(place: Path, sizes: list[str]) -> None:
    config(place)
    for found in run_ranks(_compare_families, 2, str(place), sizes, timeout=300):
        for what, planned, measured in found:
            assert planned == pytest.approx(measured, rel=0.1), what


def test_planned_memory_of_tensor_ranks_of_families_is_there(tmp_path: Path) -> None:
    _check_families(tmp_path, ["qwen3", "olmo2"])


@pytest.mark.slow
def test_planned_memory_of_tensor_ranks_of_other_families_is_there(tmp_path: Path) -> None:
    _check_families(tmp_path, sorted(FAMILIES.keys() - {"qwen3", "olmo2"}))


def _held(ranks: Ranks, place: str, size: str, layouts: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Planned and real bytes of weights, gradients and moments of every layout, weights gathered as they are in a step."""
    found: list[tuple[str, float, float]] = []
    for parallel, kind in [*((layout, "adamw") for layout in layouts), (layouts[0], "muon")]:
        run = _build(place, size, ranks, parallel, micro_batch=1, kind=kind)
        run.batches.close()
        asked, mesh = run.plan.config.parallel, run.mesh
        part = parts(_work(run), asked, mesh.layout)[mesh.pipeline_rank]
        planned = memory_of(part, mesh.pipeline_rank, _work(run), asked, mesh.layout)
        run.model.forward_backward(run.data.rows(0, run.plan.config.training.global_batch // mesh.layout.data))
        modules = [inner for module in run.model._modules for inner in module.modules()]
        for module in modules:
            if isinstance(module, FSDPModule):
                module.reshard()
        stored = {id(p): p for module in modules for p in module.parameters(recurse=False)}.values()
        parts_of = [p.to_local() if isinstance(p, DTensor) else p for p in stored]
        weights = sum(p.nbytes for p in parts_of)
        own = [p.grad for p in stored if p.grad is not None]
        gradients = sum((g.to_local() if isinstance(g, DTensor) else g).nbytes for g in own)
        if asked.sharding != "none":
            for module in modules:
                if isinstance(module, FSDPModule):
                    module.unshard()
            weights += sum(p.nbytes for p in {id(p): p for m in modules for p in m.parameters(recurse=False)}.values())
        moments = sum(moment.nbytes for moment in run.optimizer.state().values())
        for what, real in (("weights", weights), ("gradients", gradients), ("optimizer", moments)):
            found.append((f"{what}, {parallel}, {kind}", getattr(planned, what), real))
    return found


@pytest.mark.parametrize("size", ["tied", "small", "qwen2", pytest.param("olmo2", marks=pytest.mark.slow)])
def test_planned_memory_of_pipelines_is_there(tmp_path: Path, size: str) -> None:
    orders = ("1f1b", "interleaved", "zero_bubble")
    layouts = [{"pipeline": 2, "schedule": order, "sharding": "zero2"} for order in orders]
    layouts += [{"pipeline": 2, "schedule": "zero_bubble", "tensor": 2}, {"pipeline": 2, "schedule": "zero_bubble"}]
    config(tmp_path)
    for rank, found in enumerate(run_ranks(_held, 4, str(tmp_path), size, layouts)):
        for what, planned, real in found:
            assert planned == pytest.approx(real, rel=0.02), f"rank {rank}, {what}"


def _sent(ranks: Ranks, place: str, size: str, layouts: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    found = []
    for parallel in layouts:
        run = _build(place, size, ranks, parallel, micro_batch=2)
        training_step(run, 1e-3)
        with Wire() as wire:
            training_step(run, 1e-3)
        run.batches.close()
        asked, layout = run.plan.config.parallel, run.mesh.layout
        part = parts(_work(run), asked, layout)[run.mesh.pipeline_rank]
        found.append((str(parallel), traffic_of(part, _work(run), asked, layout).total, wire.bytes))
    return found


@pytest.mark.parametrize(
    ("world_size", "size", "layouts"),
    [
        (2, "wide", OF_TWO),
        pytest.param(2, "olmo2", OF_TWO, marks=pytest.mark.slow),
        pytest.param(2, "qwen2", OF_TWO, marks=pytest.mark.slow),
        (
            4,
            "tied",
            [
                {"pipeline": 2},
                {"pipeline": 2, "schedule": "interleaved", "sharding": "zero2"},
                {"pipeline": 2, "schedule": "zero_bubble", "sharding": "zero2"},
                {"pipeline": 2, "schedule": "zero_bubble", "tensor": 2},
            ],
        ),
        (
            4,
            "wide",
            [
                {},
                {"tensor": 2},
                {"sharding": "zero3", "shard_ranks": 2},
                {"sharding": "zero2", "tensor": 2},
                {"tensor": 2, "pipeline": 2},
                {"tensor": 2, "sequence": True, "pipeline": 2},
            ],
        ),
    ],
)
def test_no_layout_sends_more_than_it_must(tmp_path: Path, world_size: int, size: str, layouts: list[dict[str, Any]]) -> None:
    """Planned is the analytical minimum; what is sent beside it are a few numbers a step."""
    config(tmp_path)
    for rank, found in enumerate(run_ranks(_sent, world_size, str(tmp_path), size, layouts)):
        for layout, planned, sent in found:
            assert sent == pytest.approx(planned, rel=0.05), f"rank {rank}, {layout}"


def _with_teacher(ranks: Ranks, place: str, layouts: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Planned and real bytes of the weights and of what a step sends, the teacher's among them."""
    found = []
    for parallel in layouts:
        asked = config(
            Path(place),
            folder=f"{place}/run",
            model=SIZES["deep"] | {"num_layers": 5},
            training={"micro_batch": 2},
            parallel=parallel,
            distill={"from": f"{place}/teacher"},
        )
        run = build(make_plan(asked), ranks)
        training_step(run, 1e-3)
        with Wire() as wire:
            training_step(run, 1e-3)
        run.batches.close()
        layout, teacher = run.mesh.layout, run.model.teacher
        assert teacher is not None
        work = replace(_work(run), teacher=run.plan.taught_by)
        part = parts(work, asked.parallel, layout)[run.mesh.pipeline_rank]
        own = sum(p.nbytes for p in run.model.parameters.values())
        theirs = sum(p.nbytes for p in {id(p): p for m in teacher._modules for p in m.parameters()}.values())
        planned = memory_of(part, run.mesh.pipeline_rank, work, asked.parallel, layout)
        found.append((f"weights, {parallel}", planned.weights, float(own + theirs)))
        found.append((f"sent, {parallel}", traffic_of(part, work, asked.parallel, layout).total, wire.bytes))
    return found


@pytest.mark.parametrize("name", ["wide", "olmo2"])
def test_a_teacher_is_planned_too(tmp_path: Path, name: str) -> None:
    usual = {"model": SIZES[name] | {"num_layers": 6, "vocab_size": 64}, "training": {"budget": 2}}
    train(config(tmp_path, folder=str(tmp_path / "teacher"), **usual), ALONE, quiet())
    layouts: list[dict[str, Any]] = [
        {"tensor": 2},
        {"tensor": 2, "sequence": True},
        {"pipeline": 2},
        {"pipeline": 2, "schedule": "interleaved"},
        {"pipeline": 2, "schedule": "zero_bubble"},
    ]
    for rank, found in enumerate(run_ranks(_with_teacher, 2, str(tmp_path), layouts)):
        for what, planned, real in found:
            assert real == pytest.approx(planned, rel=0.05), f"rank {rank}, {what}"


def _sent_by_families(ranks: Ranks, place: str, sizes: list[str]) -> list[tuple[str, float, float]]:
    found = []
    for size, recompute in itertools.product(sizes, ("none", "full")):
        for parallel in ({"tensor": 2}, {"tensor": 2, "sequence": True}):
            run = _build(place, size, ranks, parallel, micro_batch=2, recompute=recompute)
            training_step(run, 1e-3)
            with Wire() as wire:
                training_step(run, 1e-3)
            run.batches.close()
            asked, layout = run.plan.config.parallel, run.mesh.layout
            (part,) = parts(_work(run), asked, layout)
            found.append((f"{size}, {parallel}, {recompute}", traffic_of(part, _work(run), asked, layout).total, wire.bytes))
    return found


def _check_sent(place: Path, sizes: list[str]) -> None:
    config(place)
    for found in run_ranks(_sent_by_families, 2, str(place), sizes, timeout=300):
        for what, planned, sent in found:
            assert sent == pytest.approx(planned, rel=0.05), what


def test_tensor_ranks_of_families_send_what_is_planned(tmp_path: Path) -> None:
    """With and without sequence parallelism and recomputation, GPT-NeoX's two residuals among them."""
    _check_sent(tmp_path, ["olmo2", "qwen3", "wide", "sequential"])


@pytest.mark.slow
def test_tensor_ranks_of_other_families_send_what_is_planned(tmp_path: Path) -> None:
    _check_sent(tmp_path, sorted(FAMILIES.keys() - {"olmo2", "qwen3"}))


def test_layouts_are_ranked_by_time_and_fit(tmp_path: Path) -> None:
    settings = config(tmp_path, **CLUSTER)
    assert settings.model is not None
    plans = rank_layouts(settings, settings.model, 64, GPUS["a100-40gb"])
    seconds = [round(plan.seconds, 4) for plan in plans]
    assert seconds == sorted(seconds)
    assert all(plan.memory < 40 * 2**30 and 0 < plan.mfu < 0.65 and 0 <= plan.bubble < 1 for plan in plans)
    assert all(plan.layout.data * plan.layout.model == 64 for plan in plans)
    for plan in plans[::50]:  # none is recommended that would be refused
        keys: dict[str, dict[str, Any]] = {"parallel": {}, "training": {}}
        for key, value in plan.keys.items():
            keys[key.split(".")[0]][key.split(".")[1]] = value
        check_fit(validate(RunConfig, merge(mapping(tmp_path, **CLUSTER), keys), {}), settings.model, plan.layout)
    more = rank_layouts(settings, settings.model, 64, GPUS["h100-80gb"])
    assert more[0].seconds < plans[0].seconds and len(more) > len(plans)
