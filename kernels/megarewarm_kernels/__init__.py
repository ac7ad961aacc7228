"""Fused operations for training transformers, usable without megarewarm. Each stands beside its plain definition."""

from __future__ import annotations

from megarewarm_kernels.linear_cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
