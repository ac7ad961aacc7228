"""Detection of spikes in losses and gradient norms."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_LEAST_FACTOR = math.log(2.0)  # norms of small batches vary; a norm that clipping at most halves is no spike


class SpikeDetector:
    """Compares each step with the last ``window`` steps: it is a spike from ``deviations`` standard deviations above their mean
    on, in the loss or in the logarithm of the gradient norm (norms vary by factors).

    Every finite step enters the window, spikes as well, so that a lasting change of level (other data) is a spike for some
    steps and then the new level. Nothing is judged before half a window is there. The default window and deviations are those
    with which OLMo-core's optimizer skips steps.
    """

    def __init__(self, window: int, deviations: float) -> None:
        self._deviations = deviations
        self._losses: deque[float] = deque(maxlen=window)
        self._norms: deque[float] = deque(maxlen=window)

    def judge(self, loss: float, norm: float) -> str | None:
        """A description of the spike in this step's mean loss or gradient norm (before clipping), or None."""
        loss_above, norm_above = _above(loss, self._losses), _above(_log(norm), self._norms)
        count = len(self._losses)
        if loss_above is not None and loss_above.deviations >= self._deviations:
            return f"loss {loss:.4f}, {loss_above} the mean {loss_above.mean:.4f} of the last {count} steps"
        if norm_above is not None and norm_above.deviations >= self._deviations and norm_above.distance > _LEAST_FACTOR:
            return f"gradient norm {norm:.4g}, {norm_above} the mean {math.exp(norm_above.mean):.4g} of the last {count} steps"
        return None

    def add(self, loss: float, norm: float) -> None:
        """Add a step to the window."""
        self._losses.append(loss)
        self._norms.append(_log(norm))

    def clear(self) -> None:
        """Clear the window, after a roll-back."""
        self._losses.clear()
        self._norms.clear()

    def state(self) -> dict[str, list[float]]:
        """The window, so that a resumed run judges as the uninterrupted one."""
        return {"losses": list(self._losses), "norms": list(self._norms)}

    def restore(self, losses: Sequence[float], norms: Sequence[float]) -> None:
        """Restore ``state``; of a longer window its end."""
        self.clear()
        self._losses.extend(losses)
        self._norms.extend(norms)


@dataclass(frozen=True)
class _Above:
    mean: float
    distance: float
    deviations: float

    def __str__(self) -> str:
        return f"{self.deviations:.1f} deviations above" if math.isfinite(self.deviations) else "above"


def _above(value: float, known: deque[float]) -> _Above | None:
    """How far ``value`` is above those ``known``; None while half a window is missing, or if it is not above."""
    assert known.maxlen is not None
    if len(known) < max(2, known.maxlen // 2):
        return None
    mean, deviation = float(np.mean(known)), float(np.std(known))
    distance = value - mean
    if distance <= 1e-6 * abs(mean):
        return None
    return _Above(mean, distance, distance / deviation if deviation > 0 else math.inf)


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-300))
