"""NVIDIA apex's fused norm and optimizer, where that package is really there.

The package index has another project called apex, so what counts is not the name of the module but what is in it, and whether
its compiled part loads.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any


@lru_cache
def fused_layer_norm() -> Callable[..., Any] | None:
    """f(x, weight, bias, shape, eps), which takes weights of another dtype than x; None where apex is not there."""
    found = _symbol("fused_layer_norm_cuda", "apex.normalization.fused_layer_norm", "mixed_dtype_fused_layer_norm_affine")
    return found if callable(found) else None


@lru_cache
def fused_adam() -> type | None:
    """The class FusedAdam; None where apex is not there."""
    found = _symbol("amp_C", "apex.optimizers", "FusedAdam")
    return found if isinstance(found, type) else None


def _symbol(compiled: str, module: str, name: str) -> Any:
    try:
        importlib.import_module(compiled)
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, OSError, RuntimeError, AttributeError):
        return None
