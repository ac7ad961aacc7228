"""Validation losses: every named set on the same tokens each time, weighted by tokens, equal for any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megarewarm.parallel.agreement import Between, all_reduce_sums, nothing_between
from megarewarm.parallel.engine import ParallelModel
from megarewarm.parallel.mesh import Mesh


class Windows(Protocol):
    """The windows of one evaluation of one set."""

    def share(self, rank: int, world: int) -> range: ...

    def micro_batches(self, rank: int, world: int, micro_batch: int) -> Iterator[npt.NDArray[np.int64]]: ...


def evaluate(
    model: ParallelModel, windows: Windows, micro_batch: int, mesh: Mesh, between: Between = nothing_between
) -> tuple[float, int]:
    """Mean loss in nats per token over all windows of a set, and the number of tokens it is the mean of."""
    ranks = mesh.layout.data
    rows = windows.micro_batches(mesh.data_rank, ranks, micro_batch)
    most = max(len(windows.share(rank, ranks)) for rank in range(ranks))
    total, count = all_reduce_sums(model.evaluate(rows, most, micro_batch, between))
    return total / count if count else math.nan, int(count)
