"""Weights in the dtype of matrix products, kept beside the fp32 ones: autocast would make them again at every micro-batch.

A copy is made again where its parameter's version counter has moved. PyTorch's in-place operations move it, through views and
``detach()`` too; ``.data`` and optimizers written for it do not. Who writes by such a way either writes the copy as well (the
fused AdamW) or moves the counter (``torch.autograd.graph.increment_version``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from megarewarm_kernels.products import linear
from torch import Tensor, nn
from torch.nn import functional as F

from megarewarm.model.autocast import at_work


class LowCopy:
    """The copy of one parameter in ``dtype``, at one address as long as the model lives."""

    def __init__(self, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        self._parameter, self._copy = parameter, torch.empty_like(parameter.detach(), dtype=dtype)
        self._version = -1

    def fresh(self) -> Tensor:
        """It, of the parameter as it is now. To write to it is to claim that the parameter has been written alike."""
        if self._version != self._parameter._version:
            self._copy.copy_(self._parameter.detach())
            self._version = self._parameter._version
        return self._copy

    def is_right(self) -> bool:
        """Whether it holds the parameter's values, bit for bit; reads both."""
        true = self._parameter.detach().to(self._copy.dtype)
        return not bool((self.fresh().view(torch.int16) != true.view(torch.int16)).any())


class LowLinear(nn.Linear):
    """A linear layer that multiplies by ``low``, the copies of its weight and of its bias; see ``product``."""

    def forward(self, x: Tensor) -> Tensor:
        return product(self, x, self.bias)


def product(module: nn.Linear, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` by the module's weight, and its ``bias`` where that is given, (..., h) to (..., o).

    Under autocast by the copies, if the module has some; else as PyTorch does it. A ``bias`` that is detached gets no gradient
    here.
    """
    low = copies_of(module, x.device.type)
    if low is None:
        return F.linear(x, module.weight, bias)
    return linear(at_work(x), module.weight, bias, low["weight"].fresh(), None if bias is None else low["bias"].fresh())


def copies_of(module: nn.Linear, device: str) -> Mapping[str, LowCopy] | None:
    """What products on a ``device`` of this type read instead of the module's parameters, by name; None: these."""
    low: Mapping[str, LowCopy] | None = module.__dict__.get("low")
    return low if torch.is_autocast_enabled(device) else None


def keep_copies(modules: Iterable[nn.Module], dtype: torch.dtype) -> dict[str, LowCopy]:
    """Give every linear layer in ``modules`` copies in ``dtype``; the copies by their parameters' names."""
    found: dict[str, LowCopy] = {}
    for module in modules:
        for prefix, part in module.named_modules():
            if not isinstance(part, nn.Linear):
                continue
            made = {name: LowCopy(parameter, dtype) for name, parameter in part.named_parameters()}
            part.low = made  # type: ignore[assignment]
            if type(part) is nn.Linear:
                part.__class__ = LowLinear
            found |= {f"{prefix}.{name}": copy for name, copy in made.items()}
    return found
