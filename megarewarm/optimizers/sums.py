"""Sums over the values of a parameter in float64, a slice at a time, for what ``logging.dynamics`` shows of a step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megarewarm.parallel.gradients import ROW, squared_norm

SUMS = 7
"""Number of values; squares of weights, change, both moments, distance; effective learning rates."""
_SLICE = 2**22  # values at a time: temporaries take some 16 MiB each
_CACHED = 2**18  # on a CPU, where temporaries stay in its caches


def slices(values: Tensor) -> Iterator[tuple[int, int, int]]:
    """(begin, end, length of a row) of the flat ``values``, each whole rows, the rest a row of its own."""
    count, size = values.numel(), _CACHED if values.device.type == "cpu" else _SLICE
    whole = count - count % ROW
    for begin in range(0, whole, size):
        yield begin, min(begin + size, whole), ROW
    if whole < count:
        yield whole, count, count - whole


def norms(rows: Tensor) -> Tensor:
    """The norm of each row: short enough for fp32."""
    return torch.linalg.vector_norm(rows, dim=1)


def squares(values: Tensor) -> Tensor:
    """The sum of squares, fp64."""
    return squared_norm([values])


def without_formula(weights: Tensor, change: Tensor, moment: Tensor, start: Tensor | None, rates: float) -> Tensor:
    """The sums where the optimizer has measured its own ``change`` (its squares); there is no second moment."""
    distance = torch.zeros_like(change) if start is None else squares(weights - start.to(weights.device))
    count, rate = (torch.full_like(change, float(number)) for number in (weights.numel(), rates))
    return torch.stack([count, squares(weights), change, squares(moment), torch.zeros_like(change), distance, rate])
