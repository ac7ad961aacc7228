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


# kernel -> compute capability -> width of a head's block -> launch, for bf16 and fp16. None of these spills registers or takes
# more shared memory than there is (99 KiB for the 8.x family); chosen from the compiler's output, not yet from measured
# times.
HALF: dict[str, dict[int, dict[int, Blocks]]] = {
    "forward": {
        80: {
            16: Blocks(128, 64, 4, 3),
            32: Blocks(128, 128, 8, 3),
            64: Blocks(128, 128, 8, 3),
            128: Blocks(64, 32, 4, 2),
            256: Blocks(32, 32, 4, 2),
        },
        90: {
            16: Blocks(128, 128, 8, 3),
            32: Blocks(128, 128, 8, 3),
            64: Blocks(128, 64, 4, 3),
            128: Blocks(128, 64, 8, 3),
            256: Blocks(64, 32, 8, 2),
        },
        100: {
            16: Blocks(128, 64, 4, 3),
            32: Blocks(128, 64, 4, 3),
            64: Blocks(128, 64, 4, 3),
            128: Blocks(128, 64, 8, 3),
            256: Blocks(64, 32, 8, 2),
        },
    },
    "queries": {
        80: {
            16: Blocks(128, 128, 8, 2),
            32: Blocks(128, 128, 8, 2),
            64: Blocks(128, 64, 8, 2),
            128: Blocks(64, 32, 4, 2),
            256: Blocks(32, 32, 4, 2),
        },
        90: {
            16: Blocks(128, 128, 8, 2),
            32: Blocks(128, 128, 8, 2),
            64: Blocks(128, 64, 8, 2),
            128: Blocks(128, 64, 8, 2),
            256: Blocks(64, 32, 8, 2),
        },
        100: {
            16: Blocks(128, 64, 8, 2),
            32: Blocks(128, 64, 8, 2),
            64: Blocks(128, 64, 8, 2),
            128: Blocks(128, 64, 8, 2),
            256: Blocks(64, 32, 4, 2),
        },
    },
    "keys": {
        80: {
            16: Blocks(64, 128, 8, 2),
            32: Blocks(64, 128, 8, 2),
            64: Blocks(64, 64, 8, 2),
            128: Blocks(32, 64, 8, 2),
            256: Blocks(32, 32, 8, 1),
        },
        90: {
            16: Blocks(64, 128, 8, 2),
            32: Blocks(64, 128, 8, 2),
            64: Blocks(64, 128, 8, 2),
            128: Blocks(32, 64, 8, 2),
            256: Blocks(32, 32, 8, 2),
        },
        100: {
            16: Blocks(64, 128, 8, 2),
            32: Blocks(64, 128, 8, 2),
            64: Blocks(64, 128, 8, 2),
            128: Blocks(64, 128, 8, 2),
            256: Blocks(32, 32, 8, 2),
        },
    },
}
# where comparing documents takes more registers than the launch above leaves
DOCUMENTS: dict[tuple[str, int, int], Blocks] = {
    ("forward", 80, 64): Blocks(64, 64, 4, 3),
    ("forward", 90, 64): Blocks(128, 128, 8, 3),
    ("queries", 80, 32): Blocks(64, 64, 4, 2),
    ("queries", 100, 64): Blocks(64, 64, 4, 2),
}
# where walking along the queries of a group does
GROUPED: dict[tuple[str, int, int], Blocks] = {
    ("keys", 80, 64): Blocks(32, 64, 8, 2),
    ("keys", 90, 64): Blocks(64, 64, 8, 2),
    ("keys", 100, 64): Blocks(64, 64, 8, 2),
    ("keys", 100, 128): Blocks(32, 64, 8, 1),
}
# kernel -> width of a head's block -> launch, for fp32, which is there for exactness: no tensor cores. The same on every GPU,
# within the memory of the smallest. Two stages spare registers too: what is copied ahead waits in shared memory.
EXACT: dict[str, dict[int, Blocks]] = {
    "forward": {
        16: Blocks(64, 32, 8, 2, "ieee"),
        32: Blocks(64, 32, 8, 2, "ieee"),
        64: Blocks(64, 32, 8, 2, "ieee"),
        128: Blocks(32, 16, 8, 2, "ieee"),
        256: Blocks(32, 16, 8, 2, "ieee"),
    },
    "queries": {
        16: Blocks(64, 32, 8, 2, "ieee"),
        32: Blocks(64, 32, 8, 2, "ieee"),
        64: Blocks(64, 32, 8, 2, "ieee"),
        128: Blocks(16, 16, 8, 2, "ieee"),
        256: Blocks(16, 16, 16, 2, "ieee"),
    },
    "keys": {
        16: Blocks(32, 64, 8, 1, "ieee"),
        32: Blocks(32, 64, 8, 1, "ieee"),
        64: Blocks(32, 32, 8, 1, "ieee"),
        128: Blocks(16, 32, 8, 2, "ieee"),
        256: Blocks(16, 16, 8, 2, "ieee"),
    },
}
INTERPRETED = Blocks(32, 32, 4, 1, "ieee")
"""In the interpreter, whatever the dtype."""


def width_of(head_dim: int) -> int:
    """Channels of a block: a power of two, and no less than a tensor core takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def architecture(device: torch.device) -> int:
    """80, 90 or 100, the column of the table; 0 on a CPU, where Triton is interpreted."""
    if device.type != "cuda":
        return 0
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100}.get(major, 80)  # 12, the smaller Blackwell, has the memory and the instructions of 8


def blocks_of(kernel: str, head_dim: int, dtype: torch.dtype, arch: int, documents: bool, group: int = 1) -> Blocks:
    """For "forward", "queries" or "keys"; ``group``: queries of each key head."""
    if not arch:
        return INTERPRETED
    width = width_of(head_dim)
    if dtype == torch.float32:
        return EXACT[kernel][width]
    place = kernel, arch, width
    other = (GROUPED.get(place) if group > 1 else None) or (DOCUMENTS.get(place) if documents else None)
    return other or HALF[kernel][arch][width]
