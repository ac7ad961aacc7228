"""Rotary positions of a sequence, and of the documents in it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megarewarm.config.model import ModelConfig, RotaryScaling


class Positions(NamedTuple):
    """``cos``, ``sin``: (s, r / 2) or, where positions restart in documents, (b, s, r / 2). ``starts``: (b, s) int32, the first
    position of the document that each position lies in; None if a sequence is one document."""

    cos: Tensor
    sin: Tensor
    starts: Tensor | None


def positions_of(length: int, config: ModelConfig, x: Tensor, starts: Tensor | None = None) -> Positions:
    """Cosines and sines of position x frequency (arXiv 2104.09864) on the device of ``x``: fp32, or fp64 for fp64. Computed
    at every forward, some thousand numbers: a buffer would be lost on the meta device and cast by ``.to``."""
    frequencies, factor = _frequencies(config, x.device)
    place = torch.arange(length, device=x.device)
    if starts is not None:
        place = place - starts
        starts = starts.to(torch.int32)
    angles = place.float()[..., None] * frequencies
    exact = torch.promote_types(x.dtype, torch.float32)
    return Positions((angles.cos() * factor).to(exact), (angles.sin() * factor).to(exact), starts)


def _frequencies(config: ModelConfig, device: torch.device) -> tuple[Tensor, float]:
    """(angle per position of each plane (r / 2,) fp32, what cosines and sines are multiplied by)."""
    dims, base, scaling = config.rotary_dims, config.rotary_base, config.rotary_scaling
    frequencies = 1.0 / base ** (torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims)
    if scaling is None or not dims:
        return frequencies, 1.0
    slow = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slow, 1.0
    assert scaling.original_positions is not None
    turns = scaling.original_positions * frequencies / (2 * math.pi)
    if scaling.kind == "llama3":
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        return torch.lerp(slow, frequencies, kept.clamp(0, 1)), 1.0
    first, last = (
        dims * math.log(scaling.original_positions / (beta * 2 * math.pi)) / (2 * math.log(base))
        for beta in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dims - 1)
    ramp = (torch.arange(dims // 2, device=device) - first) / (last - first or 0.001)
    return torch.lerp(frequencies, slow, ramp.clamp(0, 1)), _attention_factor(scaling)


def _attention_factor(scaling: RotaryScaling) -> float:
    """YaRN's temperature (arXiv 2309.00071, section 3.4), by which queries and keys are multiplied each."""
    of = lambda mscale: 1.0 if scaling.factor <= 1 else 0.1 * mscale * math.log(scaling.factor) + 1  # noqa: E731
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return of(scaling.mscale) / of(scaling.mscale_all_dim)
    return of(1.0)
