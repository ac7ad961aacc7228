"""Weight averages of several checkpoints, one parameter at a time: a cheap cure for forgetting.

The mean of the last checkpoints stands for a decayed learning rate; interpolation between the start and the end of a re-warmed
run trades what was learnt against what was forgotten (Wortsman et al., arXiv 2109.01903; Ilharco et al., arXiv 2208.05592).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megarewarm.checkpoint.weights import Description, Weights
from megarewarm.config.schema import ModelConfig
from megarewarm.errors import UserError

_SHAPE = ("num_layers", "hidden_size", "num_heads", "mlp_size", "vocab_size", "tie_embeddings", "attention_bias", "residual")


def mean_shares(count: int) -> list[float]:
    """Equal shares of ``count`` checkpoints."""
    return [1 / count] * count


def ema_shares(count: int, decay: float) -> list[float]:
    """Shares of a moving average that starts at the first (oldest): average = decay * average + (1 - decay) * next.

    Raises ``UserError`` for a decay outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise UserError(f"--ema {decay:g}: the decay must lie in [0, 1)")
    return [decay ** (count - 1)] + [(1 - decay) * decay ** (count - 1 - i) for i in range(1, count)]


def interpolation_shares(alpha: float) -> list[float]:
    """Shares of start and end: (1 - alpha) * start + alpha * end. Beyond 0 and 1 it extrapolates."""
    return [1 - alpha, alpha]


class Combination:
    """The sum of ``shares[i] * weights[i]``, computed in float64, given in fp32."""

    def __init__(self, weights: Sequence[Weights], shares: Sequence[float]) -> None:
        self._weights, self._shares = list(weights), list(shares)
        self.where = " + ".join(f"{share:.4g} x {each.where}" for share, each in zip(shares, weights, strict=True))

    def describe(self) -> Mapping[str, Description]:
        first = self._weights[0].describe()
        return {name: Description(item.shape, torch.float32, item.place) for name, item in first.items()}

    def read(self, name: str) -> Tensor:
        total: Tensor | None = None
        for weights, share in zip(self._weights, self._shares, strict=True):
            if share == 0:
                continue
            part = weights.read(name)
            total = torch.zeros(part.shape, dtype=torch.float64) if total is None else total
            total.add_(part, alpha=share)
        assert total is not None, "all shares are zero"
        return total.float()


def check_alike(models: Sequence[tuple[str, ModelConfig]]) -> None:
    """Raise ``UserError`` naming what differs between the models of several checkpoints."""
    (first, one), *others = models
    for name, other in others:
        for key in _SHAPE:
            if getattr(one, key) != getattr(other, key):
                raise UserError(
                    f"{name}: {key} is {getattr(other, key)}, in {first} it is {getattr(one, key)}; only checkpoints of "
                    f"the same model can be averaged"
                )
