"""Tests that say nothing of a device, on one: what they make lies there, random numbers come from its own generator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@contextmanager
def everything_on(device: str) -> Iterator[None]:
    """Tensors and generators that are made without a device are made on ``device``; products of fp32 are exact."""
    tf32 = torch.backends.cuda.matmul.allow_tf32

    class Generator(torch.Generator):  # a class: modules that are imported meanwhile may name it in their annotations
        def __new__(cls, where: str | torch.device = device) -> Generator:
            return super().__new__(cls, where)  # type: ignore[call-arg]

    with pytest.MonkeyPatch.context() as patch, torch.device(device):
        patch.setattr(torch, "Generator", Generator)
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = tf32
