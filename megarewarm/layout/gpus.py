"""Data-sheet values of GPUs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Peak dense bf16 TFLOP/s; memory in GiB and its TB/s; GB/s from one GPU to others in its host and to other hosts."""

    tflops: float
    memory: float
    memory_rate: float
    inner_rate: float
    outer_rate: float
    per_host: int = 8


# The outer rate is that of one 400 Gbit/s (A100: 200) adapter per GPU, as in DGX systems.
GPUS = {
    "a100-40gb": Gpu(312, 40, 1.55, 300, 25),
    "a100-80gb": Gpu(312, 80, 2.0, 300, 25),
    "h100-80gb": Gpu(989, 80, 3.35, 450, 50),
    "h200-141gb": Gpu(989, 141, 4.8, 450, 50),
    "b200-180gb": Gpu(2250, 180, 8.0, 900, 50),
    "l40s-48gb": Gpu(362, 48, 0.86, 32, 12.5),
}
