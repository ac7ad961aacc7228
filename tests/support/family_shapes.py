"""The ``model`` section of a tiny run of each family, of sizes that divide little."""

from __future__ import annotations

from typing import Any

# as wide a spread of the initial weights as lets norms of what narrow layers give magnify no rounding;
# 67 rows of the vocabulary over 2 or 4 ranks, 13 columns of the MLP on each of 2, windows shorter than a sequence of 16
_SHAPE: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "ffn_size": 26, "vocab_size": 67, "init_std": 0.1}
_NARROW = {**_SHAPE, "hidden_size": 20, "head_dim": 6}  # all heads together are wider than the residual stream
_EVEN = {**_SHAPE, "hidden_size": 24}
_LLAMA3 = {"kind": "llama3", "factor": 4.0, "original_positions": 8, "low_freq_factor": 1.0, "high_freq_factor": 2.0}

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", **_NARROW, "rotary_scaling": _LLAMA3},
    "llama_biases": {"family": "llama", **_EVEN, "num_kv_heads": 4, "attention_bias": True, "mlp_bias": True},
    "mistral": {"family": "mistral", **_NARROW, "sliding_window": 5, "tie_embeddings": True},
    "qwen2": {"family": "qwen2", **_EVEN, "sliding_window": 7, "window_layers": (1,), "tie_embeddings": True},
    "qwen3": {"family": "qwen3", **_NARROW},
    "olmo2": {"family": "olmo2", **_EVEN},
    "smollm3": {"family": "smollm3", **_EVEN, "unrotated_layers": (1,)},
}
"""By family and what is particular, without ``num_layers``."""


def shape(name: str, layers: int, **changes: Any) -> dict[str, Any]:
    """``SHAPES[name]`` with ``layers``."""
    return {**SHAPES[name], "num_layers": layers, **changes}


def larger(name: str, layers: int = 3, times: int = 4, **changes: Any) -> dict[str, Any]:
    """``shape`` with each head ``times`` as wide, and all else with it: what a token has is then more than statistics."""
    widths = {key: value * times for key, value in SHAPES[name].items() if key in ("hidden_size", "head_dim", "ffn_size")}
    return shape(name, layers, **widths, **changes)
