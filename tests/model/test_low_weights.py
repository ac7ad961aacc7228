"""Copies of weights in the dtype of products: right after whatever writes a parameter, the bits of autocast's casts."""

from __future__ import annotations

import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megarewarm_kernels import AdamWTensors
from torch import Tensor, nn

from megarewarm.config.execution import OptimizerConfig
from megarewarm.model.fused import Operations
from megarewarm.model.low_weights import LowCopy
from megarewarm.optimizers.optimizer import make_optimizer
from megarewarm.parallel.engine import ParallelModel
from megarewarm.parallel.gradients import OwnGradients
from megarewarm.parallel.laid_out import LaidOutModel
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.spikes import SpikeDetector
from megarewarm.training.start import inputs
from megarewarm.training.trainer import train
from tests.support.family_shapes import shape
from tests.support.laid_out import SHAPE, laid_out
from tests.support.tiny import config, events, quiet

ALONE = Ranks(0, 1, torch.device("cpu"))
ROOT = Path(__file__).resolve().parents[2]


def _model(made: dict[str, Any], precision: str = "bf16", operations: Operations | None = None) -> ParallelModel:
    return laid_out(made, 4, precision, recompute="selective", operations=operations)


def _steps(model: ParallelModel, count: int = 3) -> list[float]:
    optimizer = make_optimizer(model, OptimizerConfig())
    rows = np.random.default_rng(0).integers(64, size=(4, 17), dtype=np.int64)
    found = []
    for _ in range(count):
        model.gradients.zero()
        losses = model.forward_backward(rows)
        model.gradients.reduce()
        found += [losses.sum, model.gradients.norm()]
        optimizer.step(1e-2, model.gradients, 0.5)
    return found


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize(
    "model", [SHAPE, {**SHAPE, "tie_embeddings": True}, shape("qwen2", layers=2)], ids=["neox", "tied", "qwen2"]
)
def test_steps_are_those_of_autocast_bit_for_bit(model: dict[str, Any], triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    operations = Operations("triton", "triton") if triton else None
    kept = _model(model, operations=operations)
    assert kept.low
    ours = _steps(kept)
    monkeypatch.setattr(LaidOutModel, "_keep_low", lambda self, *_, **__: setattr(self, "low", {}))
    cast = _model(model, operations=operations)
    assert not cast.low
    assert ours == _steps(cast)
    for name, parameter in kept.parameters.items():
        assert torch.equal(parameter, cast.parameters[name]), name


@pytest.mark.parametrize("model", [SHAPE, shape("qwen2", layers=2), shape("olmo2", layers=2)], ids=["neox", "qwen2", "olmo2"])
@pytest.mark.parametrize("operations", [None, Operations("triton", "triton", "triton")], ids=["plain", "fused"])
def test_every_product_reads_its_copy(
    model: dict[str, Any], operations: Operations | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else autocast would cast the fp32 weight, and autograd its gradient."""
    made = _model(model, operations=operations)
    read: set[int] = set()
    fresh = LowCopy.fresh
    monkeypatch.setattr(LowCopy, "fresh", lambda self: read.add(id(self)) or fresh(self))
    monkeypatch.setattr(LaidOutModel, "_follow", lambda self: None)
    made.forward_backward(np.zeros((2, 17), np.int64))
    matrices = {name for name, card in made.cards.items() if card.is_matrix} | {"embed_out.weight"} & made.low.keys()
    assert matrices and not [name for name in matrices if id(made.low[name]) not in read]


@pytest.mark.parametrize("ends", [(4,), (3, 4)], ids=["one call", "several"])
def test_gradients_of_vectors_that_are_added_together_are_those_that_autograd_adds(ends: tuple[int, ...]) -> None:
    """As on a GPU, where each addition is a launch; a call of one micro-batch leaves its own to the next."""
    rows = np.random.default_rng(0).integers(64, size=(8, 17), dtype=np.int64)
    found = []
    for launches in (False, True):
        model = _model(SHAPE)
        model.gradients = OwnGradients(model.trained, launches=launches)
        for _ in range(2):
            model.gradients.zero()
            for first, stop in pairwise((0, *(2 * end for end in ends))):
                model.forward_backward(rows[first:stop])
            bias = model.parameters["layers.0.attention.dense.bias"]
            assert launches is False or len(ends) > 1 or bias.grad is None
            model.gradients.reduce()
        found.append(model.gradients.take())
    assert found[0].keys() == found[1].keys() == model.trained.keys()
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every read of a copy is compared with the parameter; the number of reads."""
    reads = [0]
    fresh = LowCopy.fresh

    def compared(self: LowCopy) -> Tensor:
        copy = fresh(self)
        assert torch.equal(copy, self._parameter.detach().to(copy.dtype)), "a stale copy"
        reads[0] += 1
        return copy

    monkeypatch.setattr(LowCopy, "fresh", compared)
    return reads


def _update_past_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU's one launch: parameters and copies are written at their addresses, which no version counter shows."""
    update = AdamWTensors._one_by_one

    def unseen(self: AdamWTensors, *given: Any) -> None:
        written = (*self._parameters, *(copy for copy in self._copies if copy is not None))
        with torch.autograd._unsafe_preserve_version_counter(written):
            update(self, *given)

    monkeypatch.setattr(AdamWTensors, "_one_by_one", unseen)
    monkeypatch.setattr(inputs, "choose_optimizer", lambda *_: ("triton", []))


@pytest.mark.parametrize(
    ("kind", "precision", "unseen"),
    [("adamw", "bf16", False), ("adamw", "bf16", True), pytest.param("muon", "fp16", True, marks=pytest.mark.slow)],
)
def test_no_run_reads_a_stale_copy(
    tmp_path: Path, kind: str, precision: str, unseen: bool, watched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Initialised, trained, stopped, resumed, rolled back, averaged, moved between start and end, and a start for another run
    whose layers thaw."""
    if unseen:
        _update_past_counters(monkeypatch)
    common: dict[str, Any] = {
        "training": {"precision": precision, "budget": 12},
        "optimizer": {"kind": kind},
        "checkpoint": {"every": 3, "average": {"like": "linear", "window": "4 steps", "every": "2 steps"}},
        "evaluation": {"every": 12},
        "reliability": {"spikes": "roll_back", "roll_back_steps": 2},
    }
    judged = iter([None] * 6 + ["a spike"])
    monkeypatch.setattr(SpikeDetector, "judge", lambda *_: next(judged, None))
    train(config(tmp_path, name="one", folder=str(tmp_path / "one"), **common), ALONE, quiet())
    assert [line for line in events(tmp_path / "one", "alarm") if line["kind"] == "roll_back"], "the run went back"
    later = sorted((tmp_path / "one/checkpoints").iterdir(), key=lambda path: int(path.name.split("_")[1]))[2:]
    for path in later:
        shutil.rmtree(path)
    train(config(tmp_path, name="one", folder=str(tmp_path / "one"), **common), ALONE, quiet())
    thaws = {"kind": kind, "train": {"only": ["head", "layers 1"], "for": "3 steps"}}
    start = {"from": str(tmp_path / "one"), "intent": "rewarm"}
    rest = {
        "training": {"precision": precision, "budget": 6},
        "optimizer": thaws,
        "start": start,
        "interpolate": {"alphas": [0.5]},
    }
    train(config(tmp_path, name="two", folder=str(tmp_path / "two"), **rest), ALONE, quiet())
    assert watched[0] > 500


def test_what_no_counter_shows_is_found_before_a_save() -> None:
    model = _model(SHAPE)
    model.check_copies()
    weight = model.parameters["layers.0.attention.dense.weight"]
    with torch.no_grad():
        weight.add_(1)
    model.check_copies()
    weight.data = weight.data + 1  # as code that knows nothing of the copies might do
    with pytest.raises(AssertionError, match=r"layers\.0\.attention\.dense\.weight: the copy that products read"):
        model.check_copies()


def test_nothing_in_the_product_writes_parameters_past_their_counters() -> None:
    wrong = re.compile(r"(parameter|weight|held|tensor|p)\.data\b")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in (ROOT / "megarewarm").rglob("*.py")
        for line in path.read_text().splitlines()
        if wrong.search(line)
    ]
    assert not found


def test_a_copy_follows_its_parameter_and_its_rows() -> None:
    parameter = nn.Parameter(torch.ones(4, 2))
    copy = LowCopy(parameter, torch.bfloat16)
    place = copy.fresh().data_ptr()
    rows = nn.Parameter(parameter.detach()[1:3])
    with torch.no_grad():
        rows.mul_(3)
    assert copy.fresh().tolist() == [[1, 1], [3, 3], [3, 3], [1, 1]] and copy.fresh().data_ptr() == place


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_of_rows_are_computed_in_fp32(precision: str) -> None:
    rows = np.random.default_rng(0).integers(64, size=(3, 17), dtype=np.int64)
    model = _model(SHAPE, precision)
    assert model.row_losses(rows, 3, 2) == _model(SHAPE, "fp32").row_losses(rows, 3, 2)
