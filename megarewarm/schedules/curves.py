"""The formulas of the learning-rate curves: pure functions of the position ``n`` or of a phase's progress ``u``.

``n`` is the number of optimizer steps completed before the update in question (step k, counted from 1, uses n = k - 1);
``u`` runs from 0 at the start of a phase to 1 at its end. Both may be floats or numpy arrays, and the result has the
same shape. Lengths are in steps and need not be whole; learning rates are in the optimizer's units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]


def progress(n: ArrayLike, start: float, length: float) -> Values:
    """Share of the phase that begins at ``start`` and lasts ``length`` steps which lies behind ``n``, in [0, 1]. A phase of
    no length is over as soon as it begins."""
    elapsed = np.asarray(n, dtype=np.float64) - start
    if length <= 0:
        return (elapsed >= 0).astype(np.float64)
    return np.clip(elapsed / length, 0.0, 1.0)


def warmup(n: ArrayLike, max_lr: float, length: float, clamped: bool = True) -> Values:
    """max_lr * max(1, n) / length for n <= length. ``length`` must be above 0.

    GPT-NeoX's rule (pull request 1379): the first two steps share one value, so that no step is spent at a rate of 0.
    A warmup shorter than one step would start above its own peak; where ``clamped``, it starts at the peak.
    """
    rates = max_lr * np.maximum(1.0, np.asarray(n, dtype=np.float64)) / length
    return np.minimum(rates, max_lr) if clamped else rates


def linear(u: ArrayLike, max_lr: float, min_lr: float) -> Values:
    """min_lr + (max_lr - min_lr)(1 - u)."""
    return min_lr + (max_lr - min_lr) * (1.0 - np.asarray(u))


def linear_clipped(u: ArrayLike, max_lr: float, min_lr: float) -> Values:
    """max_lr (1 - u), floored at ``min_lr``: GPT-NeoX's ``linear``, which aims at 0."""
    return np.maximum(min_lr, max_lr * (1.0 - np.asarray(u)))


def cosine(u: ArrayLike, max_lr: float, min_lr: float) -> Values:
    """min_lr + (max_lr - min_lr)/2 (1 + cos(pi u)): GPT-NeoX's ``cosine`` since pull requests 1008 and 1011."""
    return min_lr + (max_lr - min_lr) * 0.5 * (1.0 + np.cos(np.pi * np.asarray(u)))


def cosine_clipped(n: ArrayLike, max_lr: float, min_lr: float, warmup: float, length: float) -> Values:
    """max(min_lr, max_lr/2 (1 + cos(pi (min(n, T - W) - W) / T))) with W = ``warmup``, T = ``length``, for n >= W.

    GPT-NeoX's ``cosine`` before pull request 1008, with which Pythia and arXiv 2308.04014 were trained. It aims at 0
    and divides by the whole length, warmup included, so it meets a floor of max_lr/10 after about 80% of the length.
    """
    angle = np.pi * (np.minimum(np.asarray(n, dtype=np.float64), length - warmup) - warmup) / length
    return np.maximum(min_lr, max_lr * 0.5 * (1.0 + np.cos(angle)))


def exponential(u: ArrayLike, max_lr: float, min_lr: float) -> Values:
    """max_lr exp(-0.693 u), floored at ``min_lr``: GPT-NeoX's ``exponential``, which halves the rate."""
    return np.maximum(min_lr, max_lr * np.exp(-0.693 * np.asarray(u)))


def inverse_sqrt(n: ArrayLike, max_lr: float, min_lr: float, warmup: float) -> Values:
    """max(min_lr, max_lr sqrt(max(W, 1) / max(n, 1))) with W = ``warmup``, for n >= W. Megatron-LM's
    ``inverse-square-root``."""
    position = np.maximum(np.asarray(n, dtype=np.float64), 1.0)
    return np.maximum(min_lr, max_lr * np.sqrt(max(warmup, 1.0) / position))


def half_life(u: ArrayLike, max_lr: float, min_lr: float) -> Values:
    """min_lr + (max_lr - min_lr)(2 * 0.5^u - 1): Megatron-LM's exponential decay of WSD."""
    return min_lr + (max_lr - min_lr) * (2.0 * 0.5 ** np.asarray(u, dtype=np.float64) - 1.0)


def minus_sqrt(u: ArrayLike, max_lr: float, min_lr: float) -> Values:
    """min_lr + (max_lr - min_lr)(1 - sqrt(u)): the 1-sqrt decay of WSD (arXiv 2405.18392)."""
    return min_lr + (max_lr - min_lr) * (1.0 - np.sqrt(np.asarray(u, dtype=np.float64)))


def inverse_sqrt_cooldown(u: ArrayLike, max_lr: float, constant_lr: float, timescale: float) -> Values:
    """max_lr + (constant_lr - max_lr) h(u)/h(1) with h(x) = 1/sqrt(1 + a x) - 1 and a = ``timescale``. The cooldown of the
    infinite inverse-square-root schedule, arXiv 2403.08763."""

    def h(x: ArrayLike) -> Values:
        return 1.0 / np.sqrt(1.0 + timescale * np.asarray(x, dtype=np.float64)) - 1.0

    return max_lr + (constant_lr - max_lr) * (h(u) / h(1.0))


def anneal(u: ArrayLike, constant_lr: float, min_lr: float) -> Values:
    """constant_lr (min_lr / constant_lr)^u: the exponential anneal of the infinite schedules, arXiv 2403.08763."""
    return constant_lr * (min_lr / constant_lr) ** np.asarray(u, dtype=np.float64)


WSD_DECAYS: dict[str, Callable[[Any, float, float], Values]] = {
    "linear": linear,
    "cosine": cosine,
    "exponential": half_life,
    "minus_sqrt": minus_sqrt,
}
"""Shapes of the final decay of ``wsd``."""
