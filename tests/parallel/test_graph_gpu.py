"""The graph of a micro-batch on a device: a capture that fails leaves nothing behind."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from megarewarm.parallel.gradients import OwnGradients
from megarewarm.parallel.graph import MicroBatchGraph
from tests.support.on_device import NEEDS_GPU

pytestmark = NEEDS_GPU
MIB = 2**20


@pytest.mark.parametrize("what", ["waits", "too large"])
def test_a_capture_that_fails_leaves_nothing_behind(what: str) -> None:
    device = torch.device("cuda", 0)
    weight, calls = nn.Parameter(torch.ones(64, 64, device=device)), [0]

    def compute(rows: Tensor, scale: Tensor) -> Tensor:
        calls[0] += 1
        held = torch.zeros(64 * MIB, device=device)
        loss = (weight * rows[0, 0].float()).sum() + held[0]
        (loss * scale).backward()
        if calls[0] == 2:
            torch.cuda.current_stream().synchronize() if what == "waits" else torch.empty(2**44, device=device)
        return loss.detach()

    made, gradients = MicroBatchGraph(compute, (1, 5), device), OwnGradients({"weight": weight}, launches=True)
    current, before = torch.cuda.current_stream(), torch.cuda.memory_reserved()
    for _ in range(2):
        gradients.zero()
        total = made.begin(0.5, gradients, [weight])
        for row in (3, 4):
            assert made.run(torch.full((1, 5), row).pin_memory())
        assert total.item() == 7 * 64 * 64 and weight.grad is not None and bool((weight.grad == 3.5).all())
    assert calls == [5] and torch.cuda.current_stream() == current
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < 64 * MIB
    assert torch.randn(3, device=device).shape == (3,), "the generator is not held by the capture"
