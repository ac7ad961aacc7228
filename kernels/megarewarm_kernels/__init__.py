"""Fused operations for training transformers, usable without megarewarm. Each stands beside its plain definition."""

from __future__ import annotations

from megarewarm_kernels._operators import no_triton
from megarewarm_kernels.adamw import adamw_, squared_norm
from megarewarm_kernels.adamw_tensors import AdamWTensors
from megarewarm_kernels.attention import attention
from megarewarm_kernels.bias_gelu import bias_gelu
from megarewarm_kernels.flash_attention import flash_attention
from megarewarm_kernels.linear_cross_entropy import linear_cross_entropy
from megarewarm_kernels.linear_distillation import linear_distillation
from megarewarm_kernels.residual_norms import residual_norms
from megarewarm_kernels.rotary import rotate_
from megarewarm_kernels.sharded_linear_cross_entropy import sharded_linear_cross_entropy

__all__ = [
    "AdamWTensors",
    "adamw_",
    "attention",
    "bias_gelu",
    "flash_attention",
    "linear_cross_entropy",
    "linear_distillation",
    "no_triton",
    "residual_norms",
    "rotate_",
    "sharded_linear_cross_entropy",
    "squared_norm",
]
