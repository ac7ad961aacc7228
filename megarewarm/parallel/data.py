"""Replicated data parallelism: every rank holds the whole model, gradients are added up once per step.

With one rank nothing is communicated. All ranks add in the same order, so replicas stay bit-identical.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


class GradientBuffer:
    """One flat fp32 tensor whose slices are the parameters' ``.grad``: one all-reduce, one norm, one scaling.

    Parameters must be fp32, on one device, and keep their ``.grad`` (never set it to None).
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.flat = torch.zeros(
            sum(parameter.numel() for parameter in parameters), dtype=torch.float32, device=parameters[0].device
        )
        offset = 0
        for parameter in parameters:
            parameter.grad = self.flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()

    def zero(self) -> None:
        """Set all gradients to zero."""
        self.flat.zero_()

    def all_reduce_sum(self) -> None:
        """Replace the gradients by their sum over all ranks."""
        if _several():
            dist.all_reduce(self.flat)

    def norm(self) -> Tensor:
        """Global 2-norm, a scalar on the gradients' device; inf where it leaves fp32's range, nan where one is nan."""
        return torch.linalg.vector_norm(self.flat)

    def scale_(self, factor: float) -> None:
        """Multiply all gradients by ``factor``."""
        self.flat.mul_(factor)


def broadcast_parameters(model: nn.Module) -> None:
    """Give every rank the main rank's parameters."""
    if _several():
        for parameter in model.parameters():
            dist.broadcast(parameter.data, src=0)


def all_reduce_sums(values: Sequence[float]) -> list[float]:
    """The sums of ``values`` over all ranks, added in float64."""
    if not _several():
        return list(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return [float(value) for value in total.tolist()]


def agree_any(flag: bool) -> bool:
    """Whether ``flag`` is set on any rank; all ranks get the same answer."""
    return all_reduce_sums([float(flag)])[0] > 0
