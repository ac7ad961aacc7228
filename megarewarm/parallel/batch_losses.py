"""The losses of a rank's part of a batch, which stay on the device until somebody looks at them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BatchLosses:
    """Of this rank's sequences, in nats summed over their targets; zeros on a rank whose loss another rank returns, so that the
    sums over all ranks are the batch's. ``totals`` (2,) fp64, on the device: ``sum``, and ``distilled``, the teacher's term,
    summed alike; to read these two is to wait for it. ``targets``: their number; ``rows``: the loss of each sequence, where it
    was asked for."""

    totals: Tensor
    targets: float
    rows: list[float] | None = None

    @property
    def sum(self) -> float:
        return float(self.totals[0])

    @property
    def distilled(self) -> float:
        return float(self.totals[1])
