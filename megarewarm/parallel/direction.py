"""Derivatives of the losses of single rows along a direction in the space of all weights, by two forward passes.

The direction lies where gradients lie, so layouts, fused operations and recomputation work as in an evaluation, and no
gradient of a single row is ever computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megarewarm.parallel.agreement import all_reduce_sums
from megarewarm.parallel.collective import collective
from megarewarm.parallel.engine import ParallelModel
from megarewarm.parallel.gradients import squared_norm

_CHANGE = 2e-3
"""Nats by which a displacement may change the mean loss of rows. Differences are then exact to some 3e-4 of their length, from
the first step on: with a tenth of it fp32 rounds them away, with ten times as much losses bend."""
_LONGEST = 1e-3
"""Of a displacement relative to the weights, whatever the change."""


@collective
def row_derivatives(
    model: ParallelModel, rows: npt.NDArray[np.int64], most: int, micro_batch: int, steepness: float
) -> list[float]:
    """d/dh at h = 0 of the loss of each of this rank's ``rows`` (n, s + 1) with weights w + h u, where u is in
    ``model.gradients``: (loss(w + h u) - loss(w - h u)) / 2h. All ranks call it.

    ``steepness``: sum |u o g|, where g is the gradient of the rows' mean loss; it sets the scale of h. The error grows with
    h^2, and that of fp32's rounding with 1 / h. (A product without the bars may vanish; |u| alone is large where only u is.)
    Losses, ``most`` and ``micro_batch`` are those of ``ParallelModel.row_losses``.
    The weights are afterwards what they were, bit for bit. All zero for a u of length zero.
    """
    weights = {name: parameter.detach() for name, parameter in model.trained.items()}
    direction = {name: _gradient(parameter) for name, parameter in model.trained.items()}
    length, along = _norms(model, weights, direction)
    if not along or not steepness:
        return [0.0] * len(rows)
    step = min(_CHANGE / steepness, _LONGEST * length / along)
    begun = {name: values.clone() for name, values in weights.items()}
    losses = []
    try:
        for sign in (1, -1):
            for name, values in weights.items():
                torch.add(begun[name], direction[name], alpha=sign * step, out=values)
            model.forget_gathered()
            losses.append(model.row_losses(rows, most, micro_batch))
    finally:
        for name, values in weights.items():
            values.copy_(begun[name])
        model.forget_gathered()
    return [(up - down) / (2 * step) for up, down in zip(*losses, strict=True)]


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@collective
def _norms(model: ParallelModel, *tensors: Mapping[str, Tensor]) -> list[float]:
    """The 2-norms over the whole model of tensors that are laid out as what trains of it. All ranks call it."""
    squares = []
    for each in tensors:
        shards = [model.unique_trained(name, tensor) for name, tensor in each.items()]
        counted = [shard for shard in shards if shard is not None]
        squares.append(float(squared_norm(counted)) if counted else 0.0)
    return [math.sqrt(total) for total in all_reduce_sums(squares)]
