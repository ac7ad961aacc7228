"""Derivatives of rows' losses along a direction, against the gradient of every single row in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from megarewarm.model.transformer import Transformer
from megarewarm.parallel import direction
from megarewarm.parallel.direction import row_derivatives
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.run import Run
from megarewarm.training.setup import build
from megarewarm.training.start.plan import make_plan
from megarewarm.training.step import training_step
from tests.support.family_shapes import SHAPES, shape
from tests.support.tiny import config

ALONE = Ranks(0, 1, torch.device("cpu"))
Named = dict[str, Tensor]
KINDS: dict[str, dict[str, Any]] = {
    "neox": {},
    "neox_sequential": {"residual": "sequential"},
    "neox_tied": {"tie_embeddings": True, "vocab_size": 67},
    **{name: shape(name, 2) for name in SHAPES},
}


def row_losses(model: nn.Module, weights: Named, rows: Tensor) -> Tensor:
    """(rows,) cross entropies of (rows, s + 1), summed over their targets: the plain model, with all logits."""
    hidden = functional_call(model, weights, (rows[:, :-1],))
    head = weights.get("embed_out.weight", weights["embed_in.weight"])
    return F.cross_entropy(F.linear(hidden, head).transpose(1, 2), rows[:, 1:], reduction="none").sum(1)


def gradient_of(model: nn.Module, weights: Named, rows: Tensor) -> Named:
    """The gradient of their mean loss per target."""
    free = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    found = torch.autograd.grad(row_losses(model, free, rows).sum() / rows[:, 1:].numel(), list(free.values()))
    return dict(zip(free, found, strict=True))


def product(one: Named, other: Named) -> float:
    return sum(float((one[name].double() * other[name].double()).sum()) for name in one)


def along(model: nn.Module, weights: Named, rows: npt.NDArray[np.int64], u: Named) -> list[float]:
    """The derivative of the summed loss of each row."""
    each = torch.from_numpy(rows)[:, None]
    return [product(u, gradient_of(model, weights, row)) * (rows.shape[1] - 1) for row in each]


def steepness(model: nn.Module, weights: Named, rows: npt.NDArray[np.int64], u: Named) -> float:
    found = gradient_of(model, weights, torch.from_numpy(rows))
    return sum(float((values.abs() * found[name].abs()).sum()) for name, values in u.items())


def in_float64(run: Run) -> tuple[nn.Module, Named]:
    """The plain model of a run, and its weights."""
    return Transformer(run.plan.model).double(), {name: p.detach().double() for name, p in run.model.parameters.items()}


def made(place: Path, steps: int = 3, **changes: Any) -> tuple[Run, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """A run after ``steps`` steps, its next batch, and rows of its first validation set."""
    run = build(make_plan(config(place, **changes)), ALONE)
    for step in range(1, steps + 1):
        training_step(run, run.plan.lr(step))
    _, rows = next(run.batches)
    run.batches.close()
    return run, rows, next(iter(run.validation[0].portion(0, 3).micro_batches(0, 1, 3)))


def set_direction(run: Run, values: Named) -> None:
    run.model.gradients.zero()
    for name, parameter in run.model.parameters.items():
        parameter.grad = values[name].to(parameter.dtype).clone()


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_those_of_explicit_gradients(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, rows, held_out = made(tmp_path, model=KINDS[kind])
    for parameter in run.model.parameters.values():
        parameter.data = parameter.data.double()
    model, weights = in_float64(run)
    towards = gradient_of(model, weights, torch.from_numpy(held_out))
    random = torch.Generator().manual_seed(7)
    u = {name: values * torch.rand(values.shape, generator=random, dtype=torch.float64) for name, values in towards.items()}
    set_direction(run, u)
    monkeypatch.setattr(direction, "_CHANGE", 1e-5)
    found = row_derivatives(run.model, rows, len(rows), 3, steepness(model, weights, rows, u))
    wanted = along(model, weights, rows, u)
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-6 * max(map(abs, wanted)))


def test_the_step_lies_in_the_valley_of_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times as long or a hundredth as long is worse, and at its length the error is below a thousandth."""
    run, rows, held_out = made(tmp_path, steps=15)
    model, weights = in_float64(run)
    towards = gradient_of(model, weights, torch.from_numpy(held_out))
    set_direction(run, towards)
    steep = steepness(model, weights, rows, towards)
    wanted = np.array(along(model, weights, rows, towards))

    def error(change: float) -> float:
        monkeypatch.setattr(direction, "_CHANGE", change)
        found = np.array(row_derivatives(run.model, rows, len(rows), 4, steep))
        return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))

    usual = direction._CHANGE
    monkeypatch.setattr(direction, "_LONGEST", 1.0)
    at = {factor: error(factor * usual) for factor in (1.0, 100.0, 1e-3)}
    assert at[1.0] < 1e-3 and at[100.0] > 3 * at[1.0] and at[1e-3] > 3 * at[1.0], at


def ghost_products(model: Transformer, rows: Tensor, others: Tensor) -> Tensor:
    """<gradient of row i, sum of the gradients of ``others``>, (rows,), from one backward pass over all of them: of a linear
    layer sum_st (a_is . a_vt)(b_is . b_vt), with inputs a and output gradients b (arXiv 2406.11011, section 4)."""
    count, seen = len(rows), []

    def keep(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        kept = given[0].detach()
        out.register_hook(lambda upstream: seen.append((module, kept, upstream)))

    handles = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, nn.Linear | nn.LayerNorm | nn.Embedding)]
    both = torch.cat([rows, others])
    hidden = model(both[:, :-1])
    assert isinstance(model.embed_out, nn.Linear)
    logits = model.embed_out(hidden)
    F.cross_entropy(logits.transpose(1, 2), both[:, 1:], reduction="sum").backward()
    for handle in handles:
        handle.remove()
    total = torch.zeros(count)
    for module, given, upstream in seen:
        if not isinstance(module, nn.Embedding):  # some see all rows as one
            given, upstream = (t.reshape(len(both), -1, t.shape[-1]) for t in (given, upstream))
        if isinstance(module, nn.Embedding):
            same: Tensor | None = (given[:count, :, None, None] == given[None, None, count:]).to(upstream)
        elif isinstance(module, nn.Linear):
            same = torch.einsum("isd,vtd->isvt", given[:count], given[count:])
        else:
            assert isinstance(module, nn.LayerNorm)
            scaled = upstream * F.layer_norm(given, module.normalized_shape, eps=module.eps)
            total += scaled[:count].sum(1) @ scaled[count:].sum((0, 1))
            same = None
        if same is not None:
            total += (same * torch.einsum("iso,vto->isvt", upstream[:count], upstream[count:])).sum((1, 2, 3))
        if getattr(module, "bias", None) is not None:
            total += upstream[:count].sum(1) @ upstream[count:].sum((0, 1))
    return total


def test_along_the_gradient_itself_they_are_ghost_products(tmp_path: Path) -> None:
    """As of SGD, which has no preconditioner."""
    run, rows, held_out = made(tmp_path, model={"residual": "sequential"})
    model, weights = in_float64(run)
    towards = gradient_of(model, weights, torch.from_numpy(held_out))
    set_direction(run, towards)
    steep = steepness(model, weights, rows, towards)
    found = np.array(row_derivatives(run.model, rows, len(rows), 4, steep))
    torch.set_default_dtype(torch.float64)
    try:
        model.load_state_dict(weights)
        assert isinstance(model, Transformer)
        products = ghost_products(model, torch.from_numpy(rows), torch.from_numpy(held_out)).detach().numpy()
    finally:
        torch.set_default_dtype(torch.float32)
    wanted = products / held_out[:, 1:].size
    assert wanted == pytest.approx(along(model, weights, rows, towards), rel=1e-10)
    assert np.linalg.norm(found - wanted) < 1e-3 * np.linalg.norm(wanted)


def test_the_weights_are_left_as_they_were(tmp_path: Path) -> None:
    run, rows, _ = made(tmp_path)
    before = {name: p.detach().clone() for name, p in run.model.parameters.items()}
    set_direction(run, {name: torch.randn_like(p) for name, p in before.items()})
    row_derivatives(run.model, rows, len(rows), 3, 1.0)
    assert all(torch.equal(p.detach(), before[name]) for name, p in run.model.parameters.items())

    def fails(*_: Any, **__: Any) -> list[float]:
        raise RuntimeError

    run.model.row_losses = fails  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        row_derivatives(run.model, rows, len(rows), 3, 1.0)
    assert all(torch.equal(p.detach(), before[name]) for name, p in run.model.parameters.items())


def test_a_direction_of_no_length_gives_zeros(tmp_path: Path) -> None:
    run, rows, _ = made(tmp_path)
    set_direction(run, {name: torch.zeros_like(p) for name, p in run.model.parameters.items()})
    assert row_derivatives(run.model, rows, len(rows), 3, 0.0) == [0.0] * len(rows)
