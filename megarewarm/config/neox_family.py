"""Which of the models that GPT-NeoX's keys describe there are here: its own (LayerNorm, GELU) and Llama-like ones (RMSNorm,
SwiGLU); and how wide each one's MLP is. Pure rules of the keys' values, for a YAML and for a checkpoint's own settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OLD_MLP = "mlp_type"
_GELU_ONLY = "only GELU goes with LayerNorm here; GPT-NeoX's Llama-like models say norm: rmsnorm and activation: swiglu"
_SWIGLU_ONLY = "only a SwiGLU goes with RMSNorm here: activation: swiglu (up to 2024 silu with mlp_type: llama)"
_FLASH = (
    "GPT-NeoX's fused softmax (scaled_upper_triang_masked_softmax_fusion) takes no window; make every layer of "
    "attention_config 'flash', or the switch false"
)


def is_llama_like(values: Mapping[str, Any]) -> bool:
    """Whether ``values`` (keys with underscores) are of a model with RMSNorm."""
    return values.get("norm") == "rmsnorm"


def not_here(values: Mapping[str, Any]) -> dict[str, str]:
    """Keys of ``values`` by which a model is in none of the families here, each with the reason. The first one decides: what
    it is in a family of another norm or activation is not asked."""
    norm, activation, old = values.get("norm", "layernorm"), values.get("activation", "gelu"), values.get(_OLD_MLP, "regular")
    if norm not in ("layernorm", "rmsnorm"):
        return {"norm": "only LayerNorm and RMSNorm are known here"}
    if old not in ("regular", "llama", None):
        return {_OLD_MLP: "only 'regular' and 'llama' are known"}
    if norm == "layernorm":
        if old == "llama":
            return {_OLD_MLP: _GELU_ONLY}
        return {"activation": _GELU_ONLY} if activation != "gelu" else _not_neox(values)
    if activation not in (("silu", "swish") if old == "llama" else ("swiglu",)):
        return {"activation" if "activation" in values else "norm": _SWIGLU_ONLY}
    return _not_llama(values)


def _not_neox(values: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    if (heads := values.get("num_kv_heads")) and heads != values.get("num_attention_heads"):
        found["num_kv_heads"] = "with LayerNorm every head has its own keys and values here; leave it out"
    if values.get("sliding_window_width") is not None:
        found["sliding_window_width"] = "with LayerNorm attention is over the whole sequence here; leave it out"
    if not values.get("use_bias_in_mlp", True):
        found["use_bias_in_mlp"] = "with LayerNorm the MLP has biases here"
    width = width_before_rounding(values)
    if width and (rounded := _rounded(values, width)) is None:
        multiple = values["mlp_multiple_of"]
        found["mlp_multiple_of"] = (
            f"GPT-NeoX itself can't build it: the two layers of the MLP, {width} wide, are rounded to multiples of "
            f"{2 * multiple} and of {multiple}; leave it out, and give the width with intermediate_size"
        )
    elif width and rounded != width:
        found["mlp_multiple_of"] = (
            f"the MLP's width is taken as it is; give intermediate_size: {rounded}, to which it is rounded"
        )
    return found


def _not_llama(values: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    if values.get("gpt_j_residual"):
        found["gpt_j_residual"] = "the parallel residual goes with LayerNorm only here"
    if values.get("rotary_pct", 1) != 1:
        found["rotary_pct"] = "with RMSNorm every channel of a head is rotated here: 1"
    if values.get("sliding_window_width") is not None:
        if values.get("use_bias_in_attn_linear", True) or has_mlp_bias(values):
            found["sliding_window_width"] = (
                "a window goes with no biases here (the family mistral): say use_bias_in_attn_linear: false and "
                "use_bias_in_mlp: false, which GPT-NeoX has as true"
            )
        elif values.get("scaled_upper_triang_masked_softmax_fusion") and _uses_global(values.get("attention_config")):
            found["sliding_window_width"] = _FLASH
    return found


def _uses_global(attention: Any) -> bool:
    """GPT-NeoX's default is 'global' in every layer."""
    return attention is None or "'global'" in repr(attention)


def has_mlp_bias(values: Mapping[str, Any]) -> bool:
    """Whether the MLP has biases: by default, but not in the Llama MLP of GPT-NeoX up to 2024."""
    return values.get(_OLD_MLP) != "llama" and bool(values.get("use_bias_in_mlp", True))


def width_before_rounding(values: Mapping[str, Any]) -> int:
    """The MLP's width that the keys ask for; 0 where they don't say hidden_size."""
    said = (values.get(key) for key in ("hidden_size", "expansion_factor", "intermediate_size"))
    hidden, factor, width = (each if isinstance(each, int | float) else 0 for each in said)
    try:
        return int(width or (factor or 4) * hidden)
    except (OverflowError, ValueError):  # no number of columns: refused where it is translated
        return 0


def _rounded(values: Mapping[str, Any], width: int) -> int | None:
    """``width`` as GPT-NeoX rounds it; None where its two layers do not fit each other. A multiple of 1 rounds nothing here,
    as in GPT-NeoX before it had the key."""
    multiple = values.get("mlp_multiple_of") or 1
    if not isinstance(multiple, int) or multiple <= 1:
        return width
    first, second = _up(width, 2 * multiple), _up(width, multiple)
    return first if first == second else None


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def gated_width(values: Mapping[str, Any]) -> int | None:
    """Width of the gate of a Llama-like model; None where GPT-NeoX's two layers do not fit each other.

    Today's rule: two thirds of the asked width lie in the gate and the other matrix together, rounded up to twice
    mlp_multiple_of, and what comes out is half of them, rounded up to mlp_multiple_of. With mlp_type: llama it is
    intermediate_size itself, or 8/3 hidden_size up to a multiple of 256.
    """
    if values.get(_OLD_MLP) == "llama":
        return values.get("intermediate_size") or _up(int(2 * (values.get("hidden_size") or 0) * 4 / 3), 256)
    both = int(width_before_rounding(values) * 2 / 3)
    multiple = values.get("mlp_multiple_of") or 1
    if not isinstance(multiple, int) or multiple < 1:
        return None
    within, out = _up(both, 2 * multiple), _up(both // 2, multiple)
    return out if within == 2 * out and out else None
