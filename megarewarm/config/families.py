"""Families of models: the parts their layers have, and what a model of one may choose.

Every part is built from the keys of ``ModelConfig``; a family only presets them, and says which values its Hugging Face class
can hold. A new family of these parts is an entry here and one in ``checkpoint/foreign/families.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_NOTHING: tuple[Any, ...] = (None,)


@dataclass(frozen=True)
class ModelFamily:
    """``parts``: for keys of ``ModelConfig`` the values that this family may take, the usual one first. ``usual``: what other
    keys are where a configuration says nothing. ``heads_divide``: its class wants num_heads to divide hidden_size, even with
    head_dim."""

    parts: Mapping[str, tuple[Any, ...]]
    usual: Mapping[str, Any] = field(default_factory=dict)
    heads_divide: bool = False

    @property
    def presets(self) -> dict[str, Any]:
        """What a configuration of this family says without a word."""
        return {key: values[0] for key, values in self.parts.items()} | dict(self.usual)


_NO_WINDOW = {"sliding_window": _NOTHING, "window_layers": _NOTHING}
_ALL_ROTATED = {"unrotated_layers": ((),)}
_NEOX = {
    "norm": ("layer",),
    "norm_place": ("before",),
    "qk_norm": ("none",),
    "activation": ("gelu_tanh", "gelu_erf"),
    "num_kv_heads": _NOTHING,
    "head_dim": _NOTHING,
    "output_bias": _NOTHING,
    "mlp_bias": (True,),
    **_NO_WINDOW,
    **_ALL_ROTATED,
}
# RMSNorm (arXiv 1910.07467) before each sublayer, SwiGLU (2002.05202), every channel rotated (2302.13971)
_LLAMA = {
    "norm": ("rms",),
    "norm_place": ("before",),
    "qk_norm": ("none",),
    "activation": ("swiglu",),
    "residual": ("sequential",),
    "rotary_fraction": (1.0,),
    "attention_bias": (False, True),
    "output_bias": _NOTHING,
    "mlp_bias": (False,),
    **_NO_WINDOW,
    **_ALL_ROTATED,
}
_USUAL = {"layernorm_eps": 1e-6, "init": "normal", "output_init": "normal"}


def _but(parts: Mapping[str, tuple[Any, ...]], *free: str, **other: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    """``parts`` with ``other`` ones, and with the keys ``free`` to take any value."""
    return {key: values for key, values in {**parts, **other}.items() if key not in free}


FAMILIES: dict[str, ModelFamily] = {
    "neox": ModelFamily(_NEOX),
    "llama": ModelFamily(_but(_LLAMA, mlp_bias=(False, True)), _USUAL, heads_divide=True),
    "mistral": ModelFamily(_but(_LLAMA, "sliding_window", attention_bias=(False,)), _USUAL),
    # biases on queries, keys and values alone (arXiv 2407.10671)
    "qwen2": ModelFamily(
        _but(_LLAMA, "sliding_window", "window_layers", attention_bias=(True,), output_bias=(False,), head_dim=_NOTHING), _USUAL
    ),
    # each query and key normed over its channels (arXiv 2505.09388)
    "qwen3": ModelFamily(_but(_LLAMA, "sliding_window", "window_layers", qk_norm=("head",)), _USUAL),
    # norms of what the sublayers give; all queries of a token normed together, and all keys (arXiv 2501.00656)
    "olmo2": ModelFamily(
        _but(_LLAMA, norm_place=("after",), qk_norm=("width",), head_dim=_NOTHING), _USUAL | {"layernorm_eps": 1e-5}
    ),
    "smollm3": ModelFamily(
        _but(_LLAMA, "sliding_window", "window_layers", "unrotated_layers", mlp_bias=(False, True), head_dim=_NOTHING),
        _USUAL | {"rotary_base": 2e6},
    ),
}
"""By the name in ``model.family``, which is also that of the Hugging Face ``model_type`` but for neox (gpt_neox)."""
