"""Linear layers whose bias gets its gradient from what reads their results, in a pass that is made anyway."""

from __future__ import annotations

from torch import Tensor, nn

from megarewarm.model.low_weights import product


class GivenBias(nn.Linear):
    """Adds its bias without a derivative. Who reads the result gives it one: see megarewarm_kernels/layer/given_bias.py."""

    def forward(self, x: Tensor) -> Tensor:
        return product(self, x, None if self.bias is None else self.bias.detach())


def waiting_bias(linear: nn.Linear) -> Tensor | None:
    """The bias of ``linear`` to which the reader of its result has to give a gradient, if there is one."""
    return linear.bias if isinstance(linear, GivenBias) else None
