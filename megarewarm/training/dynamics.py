"""How the weights move: norms, updates, effective learning rates and distances of each part of the model, from Adam's state.

Nothing is copied before a step. Adam's moments and the weights after it say what it did: with a = lr m / (sqrt(v) + eps), the
moments corrected for their bias, w' = (1 - lr d) w - a (Loshchilov & Hutter 2019), so w' - w = -(lr d w' + a) / (1 - lr d).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megarewarm.config.schema import RunConfig
from megarewarm.parallel.agreement import all_reduce_sums
from megarewarm.parallel.engine import ParallelModel
from megarewarm.parallel.gradients import ROW
from megarewarm.training.optimizer import AdamW

ALL = "all"
_SLICE = 2**22  # values at a time: what is computed on the way takes some 16 MiB a piece
_CACHED = 2**18  # on a CPU, where that stays in its caches
_LIFT = 2.0**40  # the squares of second moments as they are would be no fp32 numbers
_SUMS = 7  # values; squares of weights, change, both moments, distance; effective learning rates

Groups = dict[str, dict[str, float]]


def dynamics_steps(config: RunConfig, first: int) -> set[int]:
    """The steps that are measured: every ``logging.dynamics`` from step ``first`` on, and the last."""
    if config.logging.dynamics is None:
        return set()
    points = config.grid(config.logging.dynamics).points(config.total_steps - first)
    return {*(first + point for point in points), config.total_steps}


def group_of(name: str) -> str:
    """The part of the model that a parameter belongs to: 'embed_in', 'layers.0', ..., 'final_layer_norm' or 'embed_out'."""
    first, second, *_ = name.split(".")
    return f"{first}.{second}" if first == "layers" else first


def measure(model: ParallelModel, optimizer: AdamW, start: Mapping[str, Tensor] | None) -> Groups:
    """The dynamics of the step that ``optimizer`` has just made, by ``group_of`` the parameters, and of 'all' of them.

    ``weight_norm``, ``first_moment_norm`` and ``second_moment_norm`` are 2-norms after the step, ``update_ratio`` the norm of
    the step's change over the weights', ``effective_lr`` the mean of lr / (sqrt(v) + eps) over the values, v corrected for its
    bias, ``distance`` the norm of weights minus ``start`` (absent where that is None). Each value of the model counts once,
    whatever the layout; embeddings that are tied are 'embed_in'. All ranks call it, and get the same numbers.
    """
    names = list(dict.fromkeys(group_of(name) for name in model.shapes))
    sums = torch.zeros(len(names), _SUMS, dtype=torch.float64, device=model.mesh.device)
    moments = optimizer.moments()
    for name, parameter in model.parameters.items():
        weights = model.counted(name, parameter)
        if weights is None:
            continue
        first, second = (model.counted(name, moments[moment, name]) for moment in ("exp_avg", "exp_avg_sq"))
        assert first is not None and second is not None
        begun = model.counted(name, start[name]) if start is not None else None
        sums[names.index(group_of(name))] += _sums(weights, first, second, begun, optimizer, name)
    total = torch.tensor(all_reduce_sums(sums.flatten().tolist()), dtype=torch.float64).view(-1, _SUMS)
    rows = {**dict(zip(names, total, strict=True)), ALL: total.sum(0)}
    return {group: _numbers(row, start is not None) for group, row in rows.items()}


def _numbers(sums: Tensor, has_start: bool) -> dict[str, float]:
    count, rates = float(sums[0]), float(sums[6])
    weight, change, first, second, distance = sums[1:6].sqrt().tolist()
    numbers = {
        "weight_norm": weight,
        "update_ratio": change / weight if weight else float("nan"),
        "effective_lr": rates / count,
        "first_moment_norm": first,
        "second_moment_norm": second,
    }
    return numbers | ({"distance": distance} if has_start else {})


def _sums(weights: Tensor, first: Tensor, second: Tensor, start: Tensor | None, optimizer: AdamW, name: str) -> Tensor:
    """The sums over the values of one parameter, (7,) fp64; all tensors are flat."""
    lr, decay = optimizer.settings(name)
    beta1, beta2 = optimizer.config.betas
    steps, eps = optimizer.completed_steps, optimizer.config.eps
    mean, root = 1 - beta1**steps, math.sqrt(1 - beta2**steps)
    # lr / (sqrt(v) / root + eps) = lr root q, q = 1 / (sqrt(v) + root eps); the factors that all values share come last
    factors = [1.0, lr * root / (mean * (1 - lr * decay)), 1.0, 1 / _LIFT, 1.0]
    total = weights.new_zeros(_SUMS - 1, dtype=torch.float64)
    for begin, end, row in _slices(weights.numel(), _CACHED if weights.device.type == "cpu" else _SLICE):
        w, m, v = (values[begin:end].view(-1, row) for values in (weights, first, second))
        q = v.sqrt().add_(root * eps).reciprocal_()
        rates = q.sum(1)
        change = q.mul_(m).add_(w, alpha=decay * mean / root)
        norms = [_norms(w), _norms(change), _norms(m), _norms(torch.mul(v, _LIFT, out=change))]
        if start is not None:
            norms.append(_norms(torch.sub(w, start[begin:end].view(-1, row).to(w.device), out=change)))
        else:
            norms.append(torch.zeros_like(norms[0]))
        squares = torch.stack(norms).double().square_().sum(1)
        total += torch.cat([squares, rates.sum(dtype=torch.float64).view(1)])
    scale = torch.tensor([*(factor**2 for factor in factors), lr * root], dtype=torch.float64, device=total.device)
    return torch.cat([total.new_full((1,), weights.numel()), total * scale])


def _slices(count: int, size: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, length of a row): ``count`` values in slices of ``size``, each whole rows, the rest a row of its own."""
    whole = count - count % ROW
    for begin in range(0, whole, size):
        yield begin, min(begin + size, whole), ROW
    if whole < count:
        yield whole, count, count - whole


def _norms(rows: Tensor) -> Tensor:
    """The norm of each row: short enough for fp32."""
    return torch.linalg.vector_norm(rows, dim=1)
