"""How operations are timed on a GPU: replayed from a CUDA graph, its cache flushed, beside the machine's own ceilings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]


def differentiated(function: Callable[..., Any], inputs: list[Tensor]) -> Run:
    """Forward and backward of ``function``; upstream gradients are made once."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
    upstream = [torch.randn_like(out) for out in outputs]

    def run() -> Any:
        found = function(*inputs)
        found = found if isinstance(found, tuple | list) else (found,)
        return torch.autograd.grad(found, inputs, upstream)

    return run


def measure(run: Run, device: str, least: float, smoke: bool) -> float:
    """Median seconds of a call, the GPU's cache flushed before each.

    On a GPU of a CUDA graph of it: PyTorch's operators take the host longer than most of these take the device. What can't be
    captured, because it waits for the device inside, is queued behind a pause of the device as long as the host may need.
    """
    for _ in range(2 if smoke else 5):
        run()
    if device != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    replay = captured(run)
    flush = torch.empty(2**28, dtype=torch.int8, device=device)
    pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    began = time.perf_counter()
    while len(pairs) < 20 or (time.perf_counter() - began < least and len(pairs) < 300):
        flush.zero_()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if replay is None:
            torch.cuda._sleep(4_000_000)  # cycles, some 2 ms
        first.record()
        (replay or run)()
        last.record()
        pairs.append((first, last))
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairs) / 1e3


def captured(run: Run) -> Run | None:
    """A call that replays the kernels of ``run``; None where it can't be captured."""
    from megarewarm.parallel import graph

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):  # what is made at the first call on a stream, such as cuBLAS's memory, is made now
            run()
        torch.cuda.current_stream().wait_stream(stream)
        return graph.captured(run, stream)
    except RuntimeError:
        torch.cuda.synchronize()
        return None


def ceilings(device: str, smoke: bool) -> tuple[float, float]:
    """(bytes a second of a copy, FLOPs a second of a bf16 product)."""
    size = 2**20 if smoke else 2**30
    source, target = (torch.empty(size, dtype=torch.int8, device=device) for _ in range(2))
    copy = measure(lambda: target.copy_(source), device, 0.5, smoke)
    n = 256 if smoke else 8192
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = measure(lambda: a @ b, device, 1.0, smoke)
    return 2 * size / copy, 2 * n**3 / product
