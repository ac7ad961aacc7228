"""Triton's interpreter with bf16 as on a GPU: values, not bit patterns; rounding to nearest even, not truncation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _bits(values: np.ndarray) -> np.ndarray:
    whole = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (whole + 0x7FFF + ((whole >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def repair() -> None:
    """Replace the interpreter's products, casts, binary and unary operations by ones that know bf16."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, binary, unary, cast = builder.create_dot, builder.binary_op, builder.unary_op, builder.cast_impl

    def wide(x: Any) -> Any:
        return handle(_values(x.data), tl.float32) if _is_bf16(x) else x

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, wide(a), wide(b), *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return handle(_bits(source.data), tl.bfloat16)
        return cast(self, source, target)

    def binary_op(self: Any, a: Any, b: Any, operation: Callable[..., np.ndarray]) -> Any:
        if not (_is_bf16(a) and _is_bf16(b)):
            return binary(self, a, b, operation)
        result = operation(_values(a.data), _values(b.data))
        return handle(result, tl.int1) if result.dtype == np.bool_ else handle(_bits(result), tl.bfloat16)

    def unary_op(self: Any, a: Any, operation: Callable[..., np.ndarray]) -> Any:
        return handle(_bits(operation(_values(a.data))), tl.bfloat16) if _is_bf16(a) else unary(self, a, operation)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    builder.binary_op, builder.unary_op = binary_op, unary_op
