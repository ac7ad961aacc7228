"""Fused operations for training transformers, usable without megarewarm. Each has its plain definition beside it."""

from __future__ import annotations

from megarewarm_kernels.attention.choose import attention
from megarewarm_kernels.attention.flash_attention import flash_attention
from megarewarm_kernels.attention.head_norms import norm_heads
from megarewarm_kernels.attention.rotary import rotate_
from megarewarm_kernels.attention.width_norms import norm_widths
from megarewarm_kernels.layer.bias_gelu import bias_gelu
from megarewarm_kernels.layer.gelu_products import gelu_products
from megarewarm_kernels.layer.given_bias import give_bias_gradients
from megarewarm_kernels.layer.residual_norms import residual_norm, residual_norms
from megarewarm_kernels.layer.rms_norm import residual_rms_norm, rms_norm
from megarewarm_kernels.layer.swiglu import swiglu
from megarewarm_kernels.loss.linear_cross_entropy import linear_cross_entropy
from megarewarm_kernels.loss.linear_distillation import linear_distillation
from megarewarm_kernels.loss.sharded_linear_cross_entropy import sharded_linear_cross_entropy
from megarewarm_kernels.loss.sharded_linear_distillation import sharded_linear_distillation
from megarewarm_kernels.operators import no_triton
from megarewarm_kernels.optimizer.adamw import adamw_, squared_norm
from megarewarm_kernels.optimizer.adamw_tensors import AdamWTensors

__all__ = [
    "AdamWTensors",
    "adamw_",
    "attention",
    "bias_gelu",
    "flash_attention",
    "gelu_products",
    "give_bias_gradients",
    "linear_cross_entropy",
    "linear_distillation",
    "no_triton",
    "norm_heads",
    "norm_widths",
    "residual_norm",
    "residual_norms",
    "residual_rms_norm",
    "rms_norm",
    "rotate_",
    "sharded_linear_cross_entropy",
    "sharded_linear_distillation",
    "squared_norm",
    "swiglu",
]
