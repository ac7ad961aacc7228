"""A stand-in for cuBLASLt on host memory: C functions that do what its manual says of the calls that we make, in float64.

Signatures, numbers of attributes and sizes are those of cublasLt.h (CUDA 13.0), written down here a second time.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any

import torch
from torch import Tensor

INVALID_VALUE, NOT_SUPPORTED = 7, 15
GELU_AUX_BIAS, DGELU_BGRAD = 32 | 128 | 4, 64 | 128 | 16
_WORKSPACE = 4096  # bytes that its algorithm asks for
_HEURISTIC = 64 + 8 + 4 + 4 + 16  # bytes of a cublasLtMatmulHeuristicResult_t
_TYPES = {2: torch.float16, 14: torch.bfloat16}
_OF_PRODUCT = {3: c_int32, 7: c_uint32, 8: c_void_p, 11: c_void_p, 12: c_int64}
_OF_PREFERENCE = {1: c_uint64, 3: c_uint32, 5: c_uint32, 6: c_uint32, 7: c_uint32, 8: c_uint32}


def gelu(z: Tensor) -> tuple[Tensor, Tensor]:
    """The tanh approximation and its derivative."""
    inner = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z**2)
    tanh = inner.tanh()
    return z * (1 + tanh) / 2, (1 + tanh) / 2 + z * (1 - tanh**2) * slope / 2


class StandIn:
    """``calls``: names of what was called; ``fails``: what returns an error; ``finds``: how many algorithms; ``chosen``: the
    alignments that each of them was promised, by the number that is its description."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails: set[str] = set()
        self.finds, self.chosen = 1, dict[int, dict[int, int]]()
        self._made: dict[int, Any] = {}
        handle, out = c_void_p, POINTER(c_void_p)
        self._add("MatmulDescCreate", self._product, out, c_int, c_int)
        self._add("MatmulDescSetAttribute", self._describe, handle, c_int, c_void_p, c_size_t)
        self._add("MatrixLayoutCreate", self._layout, out, c_int, c_uint64, c_uint64, c_int64)
        self._add("MatmulPreferenceCreate", self._preference, out)
        self._add("MatmulPreferenceSetAttribute", self._prefer, handle, c_int, c_void_p, c_size_t)
        self._add("MatmulPreferenceDestroy", self._destroy, handle)
        self._add("MatmulAlgoGetHeuristic", self._choose, *[handle] * 7, c_int, c_void_p, POINTER(c_int))
        self._add("Matmul", self._multiply, *[handle] * 14, c_size_t, handle)

    def _add(self, name: str, function: Callable[..., int], *types: Any) -> None:
        def called(*arguments: Any) -> int:
            self.calls.append(name)
            return NOT_SUPPORTED if name in self.fails else function(*arguments)

        setattr(self, f"cublasLt{name}", CFUNCTYPE(c_int, *types)(called))

    def _make(self, out: Any, what: Any) -> int:
        number = len(self.calls) * 16
        self._made[number], out[0] = what, number
        return 0

    def _product(self, out: Any, compute: int, scale: int) -> int:
        return INVALID_VALUE if (compute, scale) != (68, 0) else self._make(out, {3: 0, 7: 1})

    def _layout(self, out: Any, kind: int, rows: int, columns: int, stride: int) -> int:
        return INVALID_VALUE if stride < rows else self._make(out, (_TYPES[kind], rows, columns, stride))

    def _preference(self, out: Any) -> int:
        return self._make(out, {1: 0, 3: 7} | dict.fromkeys((5, 6, 7, 8), 256))

    def _describe(self, product: int, attribute: int, place: int, size: int) -> int:
        return self._set(self._made[product], _OF_PRODUCT[attribute], attribute, place, size)

    def _prefer(self, preference: int, attribute: int, place: int, size: int) -> int:
        return self._set(self._made[preference], _OF_PREFERENCE[attribute], attribute, place, size)

    @staticmethod
    def _set(values: dict[int, Any], kind: Any, attribute: int, place: int, size: int) -> int:
        if size != ctypes.sizeof(kind):
            return INVALID_VALUE
        values[attribute] = kind.from_address(place).value
        return 0

    def _destroy(self, preference: int) -> int:
        del self._made[preference]
        return 0

    def _choose(self, handle: Any, product: int, *rest: Any) -> int:
        *_, preference, wanted, found, count = rest
        settings, described = self._made[preference], self._made[product]
        assert wanted == 1 and settings[3] == 2, "no partial sums in bf16"
        if None in (described.get(8), described.get(11)) or described[12] % 8 or settings[1] < _WORKSPACE:
            return INVALID_VALUE
        ctypes.memset(found, 0, _HEURISTIC)
        number = 41 + len(self.chosen)
        self.chosen[number] = {key: settings[key] for key in (5, 6, 7, 8)}
        c_uint64.from_address(found).value = number
        c_size_t.from_address(found + 64).value = _WORKSPACE
        count[0] = self.finds
        return 0

    def _multiply(self, handle: Any, product: int, alpha: int, *rest: Any) -> int:
        a, of_a, b, of_b, beta, c, of_c, d, of_d, algorithm, space, size, _ = rest
        assert (c_float.from_address(alpha).value, c_float.from_address(beta).value) == (1, 0)
        described, places = self._made[product], [a or 0, b or 0, c or 0, d or 0]
        promised = self.chosen.get(c_uint64.from_address(algorithm).value)
        if promised is None or not space or size < _WORKSPACE or (c, of_c) != (d, of_d):
            return INVALID_VALUE
        if any(place % promised[key] for key, place in zip((5, 6, 7, 8), places, strict=True)):
            return INVALID_VALUE
        left, right, result = (self._matrix(place, self._made[it]) for place, it in ((a, of_a), (b, of_b), (d, of_d)))
        rows, columns = result.shape
        aux = self._matrix(described[11], (result.dtype, rows, columns, described[12]))
        bias = self._matrix(described[8], (result.dtype, rows, 1, rows))
        left = left.t() if described[3] else left
        if left.shape != (rows, right.shape[0]) or right.shape[1] != columns:
            return INVALID_VALUE
        exact = left.double() @ right.double()
        if described[7] == GELU_AUX_BIAS:
            before = exact + bias.double()
            aux.copy_(before)
            result.copy_(gelu(before)[0])
        elif described[7] == DGELU_BGRAD:
            gradient = exact * gelu(aux.double())[1]
            result.copy_(gradient)
            bias.copy_(gradient.sum(1, keepdim=True))
        else:
            return NOT_SUPPORTED
        return 0

    @staticmethod
    def _matrix(place: int, layout: tuple[torch.dtype, int, int, int]) -> Tensor:
        """The memory at ``place`` as a column-major matrix (rows, columns)."""
        dtype, rows, columns, stride = layout
        memory = (ctypes.c_char * (2 * (stride * (columns - 1) + rows))).from_address(place)
        return torch.frombuffer(memory, dtype=dtype).as_strided((rows, columns), (1, stride))
