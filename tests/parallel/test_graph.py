"""The graph of a micro-batch on a CPU, with a stand-in that repeats a capture's operations on the capture's memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megarewarm.config.execution import OptimizerConfig
from megarewarm.config.model import ModelConfig
from megarewarm.model.documents import DocumentRules
from megarewarm.model.fused import Operations
from megarewarm.optimizers.optimizer import make_optimizer
from megarewarm.parallel import graph
from megarewarm.parallel.engine import ParallelModel
from megarewarm.parallel.gradients import FlatGradients, OwnGradients
from megarewarm.parallel.graph import MicroBatchGraph, choose_graph
from megarewarm.parallel.mesh import Layout
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.start import inputs
from megarewarm.training.trainer import train
from tests.support.family_shapes import shape
from tests.support.laid_out import SHAPE, laid_out
from tests.support.loss_cases import in_place
from tests.support.tiny import config, events, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))


class Recorded(TorchDispatchMode):
    """Each operation of a capture, with the tensors that it read and made, so that none of their memory is used otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        """What lies outside of the capture and was written in it: a view of it all, and what it was."""
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        if func._schema.is_mutable:
            for tensor in given:
                place = tensor.untyped_storage().data_ptr()
                if place not in self._made and place not in self.before:
                    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                    self.before[place] = whole, whole.clone()
        out = func(*args, **kwargs)
        known = {tensor.untyped_storage().data_ptr() for tensor in given}
        self._made |= {t.untyped_storage().data_ptr() for t in tree_leaves(out) if isinstance(t, Tensor)} - known
        self.calls.append((func, args, kwargs, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            found = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(found), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Captures:
    """Stands for ``graph.captured``. ``replays``: of each capture."""

    def __init__(self) -> None:
        self.replays: list[int] = []

    def __call__(self, run: Callable[[], object], stream: object) -> Callable[[], None]:
        assert stream is None
        with Recorded() as recorded:
            run()
        for whole, held in recorded.before.values():
            whole.copy_(held)  # a capture carries nothing out
        self.replays.append(0)
        mine = len(self.replays) - 1

        def replay() -> None:
            self.replays[mine] += 1
            recorded.replay()

        return replay


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    made = Captures()
    monkeypatch.setattr(graph, "captured", made)
    return made


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("megarewarm")
    log.addHandler(handler)
    yield found
    log.removeHandler(handler)


def _model(made: dict[str, Any], precision: str = "bf16", *, fused: bool = False, flat: bool = False) -> ParallelModel:
    # not by blocks, which a CPU may have for bf16: they count a batch's documents on the host
    chosen = Operations("triton", "triton", "sdpa") if fused else Operations(attention="sdpa")
    model = laid_out(made, 7, precision, operations=chosen, documents=DocumentRules(0, reset=True, mask_loss=True))
    if flat:
        model.gradients = FlatGradients(model.trained, model.placements, model.mesh)
    return model


def _graphed(model: ParallelModel) -> ParallelModel:
    model.graph = MicroBatchGraph(lambda rows, scale: model.differentiate(rows, scale, None)[0], (2, 17), ALONE.device)
    return model


def _steps(model: ParallelModel, count: int = 3, after: Callable[[int], None] = lambda step: None) -> list[float]:
    """Losses and norms of steps of 7 rows, in which the number of targets and the loss scale change from step to step."""
    optimizer, random, found = make_optimizer(model, OptimizerConfig()), np.random.default_rng(0), []
    for step in range(count):
        model.gradients.zero()
        losses = model.forward_backward(random.integers(64, size=(7, 17), dtype=np.int64), loss_scale=2.0**step)
        model.gradients.reduce()
        found += [losses.sum, losses.targets, model.gradients.norm()]
        optimizer.step(1e-2, model.gradients, 0.5)
        after(step)
    return found


def _same(one: ParallelModel, other: ParallelModel) -> bool:
    return all(torch.equal(parameter, other.parameters[name]) for name, parameter in one.parameters.items())


@pytest.mark.parametrize(
    ("made", "settings"),
    [
        (SHAPE, {}),
        (SHAPE, {"precision": "fp32", "fused": True}),
        ({**SHAPE, "tie_embeddings": True}, {"fused": True}),
        (shape("qwen2", layers=2), {"fused": True, "flat": True}),
    ],
    ids=["neox", "fp32", "tied", "qwen2 flat"],
)
def test_replayed_micro_batches_are_the_steps_bit_for_bit(
    made: dict[str, Any], settings: dict[str, Any], captures: Captures, warnings: list[str]
) -> None:
    model, ordinary = _graphed(_model(made, **settings)), _model(made, **settings)
    assert _steps(model) == _steps(ordinary) and _same(model, ordinary)
    # of three whole micro-batches a step the very first is computed launch by launch, as the fourth, smaller one always is
    assert captures.replays == [8] and not warnings


@pytest.mark.parametrize("flat", [False, True])
def test_a_replay_reads_what_the_heads_gradient_is_multiplied_by(captures: Captures, flat: bool) -> None:
    """In its product's place; the number of targets and the loss scale differ from step to step."""
    model, ordinary = _graphed(_model(SHAPE, flat=flat)), _model(SHAPE, flat=flat)
    with in_place() as calls:
        assert _steps(model) == _steps(ordinary) and _same(model, ordinary)
    assert captures.replays == [8] and calls and all(calls)


MOVED = "kernels.graph: other parameters train, or gradients have moved in memory: the micro-batch is captured again"


def test_what_moves_is_captured_again_and_said_once(captures: Captures, warnings: list[str]) -> None:
    model, ordinary = _graphed(_model(SHAPE)), _model(SHAPE)
    assert isinstance(model.gradients, OwnGradients)

    def moved(step: int) -> None:
        if step == 0:
            taken = model.gradients.take()
            assert not any(parameter.grad is not None for parameter in model.trained.values())
            model.gradients.put_back(taken)  # where they were
        else:
            for parameter in model.trained.values():
                parameter.grad = None if parameter.grad is None else parameter.grad.clone()

    assert _steps(model, 4, moved) == _steps(ordinary, 4) and _same(model, ordinary)
    assert captures.replays == [5, 2, 2], "kernels that run for the first time are loaded outside of a capture"
    assert warnings == [MOVED]


def test_what_cannot_be_captured_is_computed_launch_by_launch(monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    tried: list[object] = []

    def refuse(run: object, stream: object) -> None:
        tried.append(run)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graph, "captured", refuse)
    model, ordinary = _graphed(_model(SHAPE)), _model(SHAPE)
    assert _steps(model) == _steps(ordinary) and _same(model, ordinary) and len(tried) == 1
    why = "operation not permitted when stream is capturing"
    assert warnings == [f"kernels.graph: not used: the micro-batch can't be captured ({why})"]


def test_losses_of_rows_go_the_ordinary_way(captures: Captures) -> None:
    model, rows = _graphed(_model(SHAPE)), np.ones((6, 17), np.int64)
    assert len(model.forward_backward(rows, per_row=True).rows or []) == 6 and not captures.replays
    model.forward_backward(rows)
    assert captures.replays == [2]


THAWS: dict[str, Any] = {"optimizer": {"train": {"only": ["head", "layers 1"], "for": "6 steps"}}}


@pytest.mark.parametrize("changes", [{}, THAWS], ids=["all trains", "thaws"])
def test_a_run_by_graphs_is_the_run(
    changes: dict[str, Any], tmp_path: Path, captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name, used in (("graph", True), ("ordinary", False)):
        monkeypatch.setattr(inputs, "choose_graph", lambda *_, used=used, **__: (used, []))
        settings = {"training": {"budget": 12, "micro_batch": 3}, "evaluation": {"every": 6}, "checkpoint": {"every": 12}}
        console = quiet()
        run = train(config(tmp_path, folder=str(tmp_path / name), **settings, **changes), ALONE, console)
        found.append([(line["step"], line["loss"], line["grad_norm"]) for line in events(run.folder, "train")])
        assert events(run.folder, "start")[0]["kernels"]["graph"] is used
    assert found[0] == found[1] and len(found[0]) == 12
    assert captures.replays == ([11, 11] if changes else [23])


H200 = "NVIDIA H200"
PYTHIA: dict[str, Any] = {"num_layers": 24, "hidden_size": 1024, "num_heads": 16, "vocab_size": 50304, "max_positions": 2048}


def _choice(place: Path, *, device: str = "cuda", attention: str = "cudnn", **changes: Any) -> tuple[bool, str]:
    documents, layout = changes.pop("documents", False), changes.pop("layout", Layout())
    made = config(place, **{"model": PYTHIA, "data": {"sequence_length": 2048}, **changes})
    where, operations = torch.device(device), Operations(attention=attention)
    chosen, notes = choose_graph(made, ModelConfig(**PYTHIA), layout, where, "bf16", operations, documents)
    assert len(notes) <= 1
    return chosen, "".join(notes)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"device": "cpu"}, "CUDA device"),
        ({"layout": Layout(tensor=2)}, "tensor ranks"),
        ({"layout": Layout(shard=2), "parallel": {"sharding": "zero2"}}, "sharding"),
        ({"kernels": {"use": "compile"}}, "compile"),
        ({"training": {"recompute": "selective"}}, "recompute"),
        ({"distill": {"from": "start"}, "start": {"from": "there", "intent": "continue"}}, "distill"),
        ({"valuation": {"against": ["old"]}}, "valuation"),
        ({"documents": True, "attention": "flash2"}, "flash2 counts documents"),
    ],
)
def test_what_is_asked_for_and_cannot_be_had_is_said(changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    kernels = changes.pop("kernels", {})
    used, line = _choice(tmp_path, **changes, kernels=kernels | {"graph": True})
    assert not used and line.startswith("kernels.graph: not used: ") and word in line
    assert _choice(tmp_path, **changes, kernels=kernels) == (False, "")


def test_auto_is_where_the_host_would_be_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H200)
    auto = {"graph": "auto"}
    assert _choice(tmp_path, training={"micro_batch": 1}) == (False, ""), "not by default"
    used, line = _choice(tmp_path, training={"micro_batch": 1}, kernels=auto)
    assert used and line.startswith("kernels.graph: auto is true") and "predicted" in line
    assert _choice(tmp_path, training={"micro_batch": 8}, kernels=auto) == (False, "")  # 84 ms of products at half the peak
    assert _choice(tmp_path, training={"micro_batch": 8}, kernels={"graph": True}) == (True, "")
    assert _choice(tmp_path, training={"micro_batch": 3}, kernels=auto) == (False, ""), "8 sequences leave a smaller one"
    assert _choice(tmp_path, documents=True, attention="triton", kernels=auto)[0] is False  # micro-batches of 4: 42 ms
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some other")
    assert _choice(tmp_path, training={"micro_batch": 1}, kernels=auto) == (False, "")
