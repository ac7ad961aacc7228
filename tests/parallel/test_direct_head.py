"""The head's gradient goes straight to its place, in every layout that keeps copies in the dtype of products: autograd's run.

The form of a GPU by its kernels' definitions. Losses are divided by a power of two, so that nothing is rounded otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megarewarm.model.fused import Operations
from megarewarm.model.parameters import EMBEDDING, HEAD
from megarewarm.parallel.engine import ParallelModel
from megarewarm.parallel.gradients import FlatGradients
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.trainer import train
from tests.parallel.test_layouts import LAYOUTS, STEPS, _settings
from tests.support.distributed import run_ranks
from tests.support.laid_out import SHAPE, laid_out
from tests.support.loss_cases import in_place
from tests.support.tiny import config, events, quiet
from tests.training.test_bad_steps import weights

ODD = {**SHAPE, "vocab_size": 67}
TIED = {**ODD, "tie_embeddings": True}
# name -> whether the head's gradient goes straight to its place there
NAMES = {
    "data": True,
    "tensor_tied": True,
    "tensor_sequence": True,
    "pipeline_tied": True,
    "pipeline_documents": True,
    "pipeline_zero_bubble": False,  # goes twice through the backward pass
    "zero2": False,  # fully_shard gathers and reduces
}


def _model(made: dict[str, Any], precision: str = "bf16") -> ParallelModel:
    return laid_out(made, 8, precision, operations=Operations("triton", "triton"))


def _flat(model: ParallelModel) -> None:
    model.gradients = FlatGradients(model.trained, model.placements, model.mesh)


def _some_rows(model: ParallelModel) -> None:
    model.train_only({HEAD: (3, 60), EMBEDDING: (3, 60), "layers.1.mlp.dense_4h_to_h.weight": None})


def _head_alone(model: ParallelModel) -> None:
    model.train_only({HEAD: None})


def _frozen_head(model: ParallelModel) -> None:
    model.train_only({name: None for name in model.parameters if name != HEAD})


CASES: dict[str, tuple[dict[str, Any], Callable[[ParallelModel], None]]] = {
    "own": (ODD, lambda model: None),
    "tied": (TIED, lambda model: None),
    "flat": (ODD, _flat),
    "flat tied": (TIED, _flat),
    "rows": (ODD, _some_rows),
    "head alone": (ODD, _head_alone),
    "frozen head": (ODD, _frozen_head),
}


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_steps_are_autograds_bit_for_bit(name: str, per_row: bool) -> None:
    made, change = CASES[name]
    rows = np.random.default_rng(0).integers(67, size=(8, 17), dtype=np.int64)
    found = []
    for direct in (True, False):
        model = _model(made)
        change(model)
        held = []
        with in_place(direct=direct) as calls:
            for loss_scale in (1.0, 4.0):
                model.gradients.zero()
                losses = model.forward_backward(rows, loss_scale, per_row=per_row)
                model.gradients.reduce()
                taken = {name: gradient.clone() for name, gradient in model.gradients.take().items()}
                held.append((losses.sum, losses.rows, taken))
        assert calls == [direct] * (16 if per_row else 8)
        found.append(held)
    for (loss, each, gradients), (wanted, others, plain) in zip(*found, strict=True):
        assert (loss, each) == (wanted, others) and gradients.keys() == plain.keys()
        assert all(torch.equal(gradient, plain[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_other_precisions_go_autograds_way(precision: str) -> None:
    """fp32 has no copies, fp16 not the range."""
    model = _model(ODD, precision)
    with in_place(direct=True) as calls:
        model.forward_backward(np.zeros((4, 17), np.int64))
    assert not any(calls)
    assert model.parameters[HEAD].grad is not None


def test_an_evaluation_leaves_the_gradient_alone() -> None:
    model = _model(ODD)
    with in_place(direct=True):
        model.evaluate([np.zeros((2, 17), np.int64)], 1, 2)
    assert model.parameters[HEAD].grad is None


def _train_both(ranks: Ranks, place: str) -> list[bool]:
    """Of each layout, whether all losses of its training had a known gradient; False: none."""
    found = []
    for name in NAMES:
        parallel, changes = LAYOUTS[2][name]
        settings = {"precision": "bf16", "recompute": "selective"}
        changes = {**changes, "training": {**changes.get("training", {}), **settings}}
        if "data" in changes:  # every target counts: their number is a power of two
            changes["data"] = {"eod": 5, "reset_at_eod": True}
        for direct in (True, False):
            with in_place(direct=direct) as calls:
                train(_settings(Path(place), f"{name}_{direct}", parallel, changes), ranks, quiet())
            if direct:
                found.append(any(calls))
    return found


@pytest.mark.slow
def test_layouts_compute_what_autograd_computes(tmp_path: Path) -> None:
    config(tmp_path)
    one, other = run_ranks(_train_both, 2, str(tmp_path), timeout=600)
    assert [a or b for a, b in zip(one, other, strict=True)] == list(NAMES.values())
    for name in NAMES:
        direct, plain = (tmp_path / f"{name}_{kept}" for kept in (True, False))
        losses = [[(line["loss"], line["grad_norm"]) for line in events(folder, "train")] for folder in (direct, plain)]
        # autograd adds both ends' gradients of a micro-batch before it adds them to those before: another order of sums
        bits = name != "tensor_tied"
        assert np.allclose(losses[0], losses[1], rtol=0 if bits else 1e-5, atol=0) and len(losses[0]) == STEPS, name
        mine, theirs = weights(direct, STEPS), weights(plain, STEPS)
        assert not bits or all(torch.equal(weight, theirs[key]) for key, weight in mine.items()), name
