"""How an operation is made known to PyTorch: its definition on every device, its Triton form on CUDA, its shapes for tracing.

Derivatives stay outside, in autograd Functions: that is the cheapest way, and torch.compile, checkpointing and FLOP counters
see one operator for each direction.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

try:
    import triton
    import triton.language

    HAS_TRITON = True
except ImportError:
    triton = None
    HAS_TRITON = False

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Triton's interpreter runs the kernels on CPU tensors: for tests. Decided by the environment when kernels are imported."""

LAUNCH = {"enable_fp_fusion": True}
"""Of every launch: a product and a sum are rounded once, together. Triton's default, until its version 3.10."""

if HAS_TRITON:
    LOG2_E = triton.language.constexpr(1.4426950408889634)
    """exp(x) is 2 to the power of LOG2_E x: exp2 is one instruction of a GPU, Triton's exp several."""

    LN_2 = triton.language.constexpr(0.6931471805599453)

    PREFETCH = triton.language.constexpr(3)
    """Stages of a loop over rows in memory: two rows are on their way while one is computed."""

_LIBRARY = torch.library.Library("megarewarm", "FRAGMENT")


def define(
    name: str,
    definition: Callable[..., Any],
    *,
    shapes: Callable[..., Any],
    kernel: Callable[..., Any] | None = None,
    mutates: Sequence[str] = (),
) -> Any:
    """Make the operator ``megarewarm::name`` with the signature of ``definition``, whose annotations are its schema.

    ``definition`` computes it on any device, ``kernel`` on CUDA (and on the CPU where Triton is interpreted), ``shapes``
    gives empty results for tracing; both take its positional arguments.
    ``mutates``: arguments that are written to.
    """
    schema = torch.library.infer_schema(definition, mutates_args=mutates)
    _LIBRARY.define(name + schema.replace("SymInt", "int"))  # kernels are compiled for plain numbers
    _LIBRARY.impl(name, definition, "CompositeExplicitAutograd")
    if kernel is not None and HAS_TRITON:
        _LIBRARY.impl(name, kernel, "CUDA")
        if INTERPRETED:
            _LIBRARY.impl(name, kernel, "CPU")
    torch.library.register_fake(f"megarewarm::{name}", shapes, lib=_LIBRARY)
    return getattr(torch.ops.megarewarm, name).default


def no_triton(device: torch.device) -> str:
    """Why Triton kernels can't run on tensors of ``device``; empty where they can."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if device.type == "cuda":
        major = torch.cuda.get_device_capability(device)[0]
        return "" if major >= 8 else f"this GPU is of compute capability {major}, the kernels are made for 8 and above"
    return "" if INTERPRETED else "it runs on GPUs"


def check_floats(**tensors: torch.Tensor | None) -> None:
    """Raise ValueError unless each is bf16, fp16, fp32 or fp64: others would be cast to what holds no such values."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise ValueError(f"'{name}' is {tensor.dtype}, need bf16, fp16, fp32 or fp64")


def exact(dtype: torch.dtype) -> torch.dtype:
    """The type in which a value of ``dtype`` is computed: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """``x`` (..., n) as (rows, n) with neighbouring columns, copied only where its strides leave no choice."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] <= 1 else flat.contiguous()


def programs(rows: int, device: torch.device) -> int:
    """Programs among which rows are divided where each adds up what it has seen: four for each multiprocessor."""
    if device.type != "cuda":
        return max(1, min(rows, 3))
    return max(1, min(rows, 4 * torch.cuda.get_device_properties(device).multi_processor_count))
