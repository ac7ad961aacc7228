"""How the kernels of flash attention are launched: blocks, warps and stages by head width, dtype and GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Blocks(NamedTuple):
    """Rows of the blocks, warps, stages of the pipeline, and how fp32 is multiplied."""

    queries: int
    keys: int
    warps: int
    stages: int
    precision: str = "tf32"


# None of these spills registers (tests/kernel_compile.py); chosen from compiler output, not yet from measured times.
HALF = {
    80: {},
}


def width_of(head_dim: int) -> int:
    """Channels of a block: a power of two, and no less than a tensor core takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def architecture(device: torch.device) -> int:
    """80, 90 or 100, the column of the table; 0 on a CPU, where Triton is interpreted."""
    if device.type != "cuda":
        return 0
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100}.get(major, 80)  # 12, the smaller Blackwell, has the memory and the instructions of 8


def blocks_of(kernel: str, head_dim: int, dtype: torch.dtype, arch: int) -> Blocks:
    """For "forward", "queries" or "keys"."""
    return Blocks(32, 32, 4, 2, "ieee")
