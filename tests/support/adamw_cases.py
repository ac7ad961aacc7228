"""AdamW over flat tensors as the tests see it, beside torch.optim.AdamW in float64."""

from __future__ import annotations

from typing import Any

import torch
from megarewarm_kernels import AdamWTensors, adamw_, squared_norm
from megarewarm_kernels.optimizer.norm_tensors import NormTensors
from torch import Tensor

SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SCALE = 0.25


def state_of(size: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Parameter, first and second moment as they are before step 1, and three gradients in ``dtype``."""
    random = torch.Generator().manual_seed(seed)
    start = torch.randn(size, generator=random)
    gradients = [torch.randn(size, generator=random).mul_(10.0**-i).to(dtype) for i in range(3)]
    return [start, torch.zeros(size), torch.zeros(size), *gradients]


def by_torch(state: list[Tensor]) -> Tensor:
    """The parameter after three steps of PyTorch's optimizer in float64."""
    parameter = state[0].double().requires_grad_()
    optimizer = torch.optim.AdamW([parameter], **SETTINGS)
    for gradient in state[3:]:
        parameter.grad = gradient.double() * SCALE
        optimizer.step()
    return parameter.detach()


def by_us(state: list[Tensor], copy: Tensor | None) -> list[Tensor]:
    """The parameter and the moments after three steps of ours."""
    parameter, first, second = (part.clone() for part in state[:3])
    for step, gradient in enumerate(state[3:], 1):
        adamw_(parameter, gradient, first, second, step=step, scale=torch.tensor(SCALE), copy=copy, **SETTINGS)
    return [parameter, first, second]


def assert_right(size: int, dtype: torch.dtype, copy_dtype: torch.dtype | None) -> None:
    """Ours against PyTorch's float64: within a few roundings of fp32; the copy is the parameter rounded."""
    state = state_of(size, dtype)
    copy = None if copy_dtype is None else torch.full((size,), float("nan"), dtype=copy_dtype)
    parameter, _, second = by_us(state, copy)
    torch.testing.assert_close(parameter.double(), by_torch(state), rtol=1e-6, atol=1e-6)
    assert (second >= 0).all()
    if copy is not None:
        assert torch.equal(copy, parameter.to(copy_dtype))


def assert_norm_is_right(size: int, dtype: torch.dtype) -> None:
    """The squared norm against float64."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    found = squared_norm(x)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and found.shape == ()
    torch.testing.assert_close(found.double(), x.double().square().sum(), rtol=2e-6, atol=0)


def assert_norm_of_many_is_right(sizes: list[int]) -> None:
    """The squared norm over tensors among NaN, against float64, also where they have moved; twice the same bits."""
    norm = NormTensors()
    for seed in range(3):
        random = torch.Generator().manual_seed(seed)
        flat = torch.full((sum(sizes) + 5 * len(sizes) + 5 + seed,), float("nan"))
        tensors, place = [], 5 + seed
        for size in sizes:
            tensors.append(flat[place : place + size].copy_(torch.randn(size, generator=random)))
            place += size + 5
        found = norm.squares(tensors)
        assert found.dtype == torch.float64 and found.shape == () and torch.equal(found, norm.squares(tensors))
        true = sum((tensor.double().square().sum() for tensor in tensors), torch.zeros((), dtype=torch.float64))
        torch.testing.assert_close(found, true, rtol=2e-6, atol=0)
    if sum(sizes):
        next(tensor for tensor in tensors if len(tensor))[-1] = float("inf")
        assert not norm.squares(tensors).isfinite()


def assert_guarded(copy: torch.dtype | None) -> None:
    """A scale that is read on the device is the scale; where it is NaN nothing is written."""
    parameters, firsts, seconds, gradients = ([torch.randn(size) for size in (5, 1030)] for _ in range(4))
    copies = [parameter.to(copy) for parameter in parameters] if copy else []
    seconds = [second.square() for second in seconds]
    held = [*parameters, *firsts, *seconds, *copies]
    ours = AdamWTensors(parameters, firsts, seconds, decays=[0.1, 0.0], copies=copies)
    before = [tensor.clone() for tensor in held]
    ours.step([torch.full_like(g, float("inf")) for g in gradients], step=1, lr=0.1, scale=torch.tensor(float("nan")))
    assert all(torch.equal(one, other) for one, other in zip(held, before, strict=True))
    ours.step(gradients, step=1, lr=0.1, scale=torch.tensor(SCALE))
    after = [tensor.clone() for tensor in held]
    for tensor, start in zip(held, before, strict=True):
        tensor.copy_(start)
    ours.step(gradients, step=1, lr=0.1, scale=SCALE)
    assert all(torch.equal(one, other) for one, other in zip(held, after, strict=True)) and not torch.equal(held[0], before[0])


def assert_many_are_right(
    sizes: list[int], *, apart: bool, scale: float = SCALE, steps: int = 3, copy: torch.dtype | None = None
) -> None:
    """Many tensors in one step each, against PyTorch's float64; ``apart``: the gradients lie elsewhere at every step; every
    other tensor has a ``copy`` that is the parameter rounded, with NaN around it."""
    random = torch.Generator().manual_seed(sum(sizes))
    starts = [torch.randn(size, generator=random) for size in sizes]
    gradients = [[torch.randn(size, generator=random).mul_(10.0**-i) for size in sizes] for i in range(steps)]
    decays = [0.1 * (i % 2) for i in range(len(sizes))]
    true = [start.double().requires_grad_() for start in starts]
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(true, decays, strict=True)]
    peer = torch.optim.AdamW(groups, **{**SETTINGS, "weight_decay": 0.0})
    # one flat tensor with NaN between the parts: nothing is read or written outside of them
    flat = torch.full((3, sum(sizes) + 7 * len(sizes) + 7,), float("nan"))  # fmt: skip
    views, place = [], 7
    for size in sizes:
        views.append(flat[:, place : place + size])
        place += size + 7
    parameters, firsts, seconds = ([view[i] for view in views] for i in range(3))
    for parameter, start, first, second in zip(parameters, starts, firsts, seconds, strict=True):
        parameter.copy_(start), first.zero_(), second.zero_()
    low = torch.full(flat.shape[1:], float("nan"), dtype=copy or torch.float32)
    at = [view.storage_offset() for view in views]
    copies = [low[a : a + size] if copy and i % 2 == 0 else None for i, (a, size) in enumerate(zip(at, sizes, strict=True))]
    rest = {"betas": SETTINGS["betas"], "eps": SETTINGS["eps"], "copies": copies}
    ours = AdamWTensors(parameters, firsts, seconds, decays=decays, **rest)
    kept = [torch.empty(size) for size in sizes]
    for step, found in enumerate(gradients, 1):
        for parameter, gradient, held in zip(true, found, kept, strict=True):
            parameter.grad = gradient.double() * scale
            held.copy_(gradient)
        peer.step()
        given = [gradient.clone() for gradient in found] if apart else kept
        ours.step(given, step=step, lr=SETTINGS["lr"], scale=scale)
    for parameter, wanted in zip(parameters, true, strict=True):
        torch.testing.assert_close(parameter.double(), wanted.detach(), rtol=1e-6, atol=1e-6)
    for parameter, held_low in zip(parameters, copies, strict=True):
        assert held_low is None or torch.equal(held_low, parameter.to(held_low.dtype))
    written = sum(len(held_low) for held_low in copies if held_low is not None)
    assert int(low.isnan().sum()) == len(low) - written
    assert int(flat.isnan().sum()) == 3 * 7 * (len(sizes) + 1), "what lies between the tensors is as it was"
