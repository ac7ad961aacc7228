"""Matrix products with epilogues of cuBLASLt that PyTorch doesn't offer: GELU with its input kept, and GELU's derivative with
the gradient of the bias. The library is the one that PyTorch has loaded; its functions are called through ctypes.

https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api. cuBLASLt's matrices are column-major: it sees a contiguous tensor
(r, c) as a matrix (c, r) with a leading dimension of c, and computes X W' as W X', whose rows are the columns of X W'.
"""

from __future__ import annotations

import ctypes
import os
import threading
from ctypes import POINTER, byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

GELU_AUX_BIAS, DGELU_BGRAD = 164, 208
"""Epilogues. D = gelu(A B + bias), and A B + bias is written to aux; D = A B * gelu'(aux), and the sum of each of its rows is
written to bias. gelu is the tanh approximation (github.com/pytorch/pytorch/pull/104061)."""

MULTIPLE = 8
"""Of this many values is each row of aux, and 16 bytes is what the products of tensor cores read at once."""

_TYPES = {torch.float16: 2, torch.bfloat16: 14}  # cudaDataType
_FLOAT = 0
_COMPUTE_FLOAT = 68  # cublasComputeType_t: sums in fp32
_WORKSPACE = 32 * 2**20  # bytes that an algorithm may ask for at most: what PyTorch allows on Hopper
_TRANSPOSE_A, _EPILOGUE, _BIAS, _AUX, _AUX_ROW = 3, 7, 8, 11, 12  # cublasLtMatmulDescAttributes_t
_MAX_WORKSPACE, _REDUCTIONS, _ALIGNMENTS = 1, 3, (5, 6, 7, 8)  # cublasLtMatmulPreferenceAttributes_t
_REDUCTION_IN_FLOAT = 2  # of partial sums of one product: none, or in the type of its sums; never in that of its result


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (("algorithm", c_uint64 * 8), ("workspace", c_size_t), ("state", c_int), ("not_used", c_int * 5))


_P = c_void_p
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cublasLtMatmulDescCreate": (POINTER(_P), c_int, c_int),
    "cublasLtMatmulDescSetAttribute": (_P, c_int, _P, c_size_t),
    "cublasLtMatrixLayoutCreate": (POINTER(_P), c_int, c_uint64, c_uint64, c_int64),
    "cublasLtMatmulPreferenceCreate": (POINTER(_P),),
    "cublasLtMatmulPreferenceSetAttribute": (_P, c_int, _P, c_size_t),
    "cublasLtMatmulPreferenceDestroy": (_P,),
    "cublasLtMatmulAlgoGetHeuristic": (*[_P] * 7, c_int, POINTER(_Heuristic), POINTER(c_int)),
    "cublasLtMatmul": (*[_P] * 14, c_size_t, _P),
}


class CublasLt:
    """The functions of a loaded library. Descriptions of products and the algorithms that its heuristic names are kept for each
    shape."""

    def __init__(self, library: Any) -> None:
        """Raises AttributeError for a library without these functions."""
        self._functions = {name: getattr(library, name) for name in _SIGNATURES}
        for name, types in _SIGNATURES.items():
            self._functions[name].argtypes, self._functions[name].restype = types, c_int
        self._plans: dict[tuple[object, ...], _Plan] = {}
        self._lock = threading.Lock()  # a plan holds the pointers of one call

    def multiply(
        self, x: Tensor, weight: Tensor, out: Tensor, bias: Tensor, aux: Tensor, *, epilogue: int, handle: int, stream: int
    ) -> None:
        """``out`` = the epilogue of ``x @ weight.T`` (GELU_AUX_BIAS) or of ``x @ weight`` (DGELU_BGRAD).

        x (t, k), weight (n, k) or (k, n), out and aux (t, n), bias (n,): contiguous, of one dtype, bf16 or fp16, k and n
        multiples of ``MULTIPLE``. ``handle``: cuBLAS's or cuBLASLt's; ``stream``: where it is queued. Raises RuntimeError with
        the name of the call that failed.
        """
        places = [tensor.data_ptr() for tensor in (weight, x, out, bias, aux)]
        alignment = min(256, *(place & -place for place in places))  # of the pointers, which an algorithm may need
        key = (x.device, x.dtype, len(x), weight.shape, epilogue, alignment)
        with self._lock:
            plan = self._plans.get(key)
            if plan is None:
                plan = self._plans[key] = _Plan(self, x, weight, epilogue)
            self.describe(plan.product, _BIAS, c_void_p(places[3]))
            self.describe(plan.product, _AUX, c_void_p(places[4]))
            if plan.algorithm is None:
                plan.choose(self, handle, alignment)
            # memory of the current stream, which may be reused by what is queued there later
            workspace = torch.empty(plan.workspace, dtype=torch.uint8, device=x.device)
            a, b, d = (c_void_p(place) for place in places[:3])
            matrices = byref(_ONE), a, plan.a, b, plan.b, byref(_ZERO), d, plan.d, d, plan.d
            space = workspace.data_ptr() if plan.workspace else None
            rest = byref(plan.algorithm), space, plan.workspace, stream
            self.call("cublasLtMatmul", handle, plan.product, *matrices, *rest)

    def call(self, name: str, *arguments: Any) -> None:
        """Raises RuntimeError where the function returns an error (a cublasStatus_t)."""
        if status := self._functions[name](*arguments):
            raise RuntimeError(f"{name} of cuBLASLt: cublasStatus_t {status}; set kernels.gelu to triton")

    def create(self, name: str, *arguments: Any) -> c_void_p:
        """What a function makes that takes the place of its result first."""
        made = c_void_p()
        self.call(name, byref(made), *arguments)
        return made

    def describe(self, product: c_void_p, attribute: int, value: Any) -> None:
        """Set an attribute of a product's description."""
        self.call("cublasLtMatmulDescSetAttribute", product, attribute, byref(value), ctypes.sizeof(value))


class _Plan:
    """A product's description, its matrices and, once chosen, its algorithm. They live as long as the process."""

    def __init__(self, lt: CublasLt, x: Tensor, weight: Tensor, epilogue: int) -> None:
        transposed = epilogue == GELU_AUX_BIAS
        columns = weight.shape[0] if transposed else weight.shape[1]
        self.product = lt.create("cublasLtMatmulDescCreate", _COMPUTE_FLOAT, _FLOAT)
        lt.describe(self.product, _TRANSPOSE_A, c_int32(int(transposed)))
        lt.describe(self.product, _EPILOGUE, c_uint32(epilogue))
        lt.describe(self.product, _AUX_ROW, c_int64(columns))
        self.a, self.b, self.d = (
            lt.create("cublasLtMatrixLayoutCreate", _TYPES[x.dtype], row, rows, row)
            for rows, row in (weight.shape, x.shape, (len(x), columns))
        )
        self.algorithm: Any = None
        self.workspace = 0

    def choose(self, lt: CublasLt, handle: int, alignment: int) -> None:
        """The algorithm that the heuristic names first; it looks at the pointers of bias and aux, which are set before."""
        preference = lt.create("cublasLtMatmulPreferenceCreate")
        limits = {_MAX_WORKSPACE: c_uint64(_WORKSPACE), _REDUCTIONS: c_uint32(_REDUCTION_IN_FLOAT)}
        for attribute, value in (limits | dict.fromkeys(_ALIGNMENTS, c_uint32(alignment))).items():
            lt.call("cublasLtMatmulPreferenceSetAttribute", preference, attribute, byref(value), ctypes.sizeof(value))
        found, count = _Heuristic(), c_int()
        given = self.product, self.a, self.b, self.d, self.d, preference
        lt.call("cublasLtMatmulAlgoGetHeuristic", handle, *given, 1, byref(found), byref(count))
        lt.call("cublasLtMatmulPreferenceDestroy", preference)
        if not count.value or found.state:
            raise RuntimeError(
                "cublasLtMatmulAlgoGetHeuristic of cuBLASLt: no algorithm for this product; set kernels.gelu to triton"
            )
        self.algorithm, self.workspace = found.algorithm, found.workspace


_ONE, _ZERO = c_float(1.0), c_float(0.0)


@cache
def loaded() -> CublasLt | None:
    """The library that PyTorch has loaded; None where there is none, or an older one."""
    version = torch.version.cuda
    if version is None:
        return None
    try:
        return CublasLt(ctypes.CDLL(f"libcublasLt.so.{version.partition('.')[0]}", mode=os.RTLD_NOLOAD))
    except (OSError, AttributeError):
        return None


def objection(device: torch.device, dtype: torch.dtype, *sizes: int) -> str:
    """Why products on ``device`` of matrices in ``dtype`` with rows of ``sizes`` values can't have these epilogues here; empty
    where they can."""
    if device.type != "cuda":
        return "it runs on GPUs"
    if dtype not in _TYPES:
        return f"its epilogues are of products in bf16 or fp16, not {str(dtype).removeprefix('torch.')}"
    if wrong := next((size for size in sizes if size % MULTIPLE), None):
        return f"its rows need multiples of {MULTIPLE} values, not {wrong}"
    return "" if loaded() is not None else "PyTorch has loaded no libcublasLt with its functions"
