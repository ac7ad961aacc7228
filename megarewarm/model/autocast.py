"""Autocast, where an operation is no linear layer."""

from __future__ import annotations

import torch
from torch import Tensor


def at_work(x: Tensor) -> Tensor:
    """``x`` in autocast's dtype under autocast."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
