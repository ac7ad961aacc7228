"""The section 'model' of a GPT-NeoX configuration: its own models, and Llama-like ones."""

from __future__ import annotations

from typing import Any

from megarewarm.config.neox_family import gated_width, has_mlp_bias, is_llama_like, width_before_rounding
from megarewarm.config.neox_values import NeoxValues

_INIT = {"normal": "normal", "small_init": "small"}
_OUTPUT_INIT = {"normal": "normal", "wang_init": "wang", "scaled_normal": "scaled_normal"}


def model_of(asked: NeoxValues) -> dict[str, Any]:
    """The model without its vocabulary. Raises ``UserError`` naming file, line and key."""
    asked.require("hidden_size")
    _check_attention(asked)
    if asked.get("intermediate_size") is not None and asked.get("expansion_factor") is not None:
        raise asked.error("expansion_factor", "given beside intermediate_size; GPT-NeoX refuses both, remove one")
    model = {
        "num_layers": asked.require("num_layers"),
        "hidden_size": asked.require("hidden_size"),
        "num_heads": asked.require("num_attention_heads"),
        "max_positions": asked.get("max_position_embeddings") or asked.require("seq_length"),
        "rotary_base": asked.get("rotary_emb_base"),
        "tie_embeddings": not asked.get("no_weight_tying"),
        "attention_bias": asked.get("use_bias_in_attn_linear"),
        "init": asked.choice("init_method", _INIT),
        "output_init": asked.choice("output_layer_init_method", _OUTPUT_INIT),
        "init_std": asked.get("init_method_std"),
    }
    return model | (_llama(asked) if is_llama_like(asked.file.values) else _neox(asked))


def _neox(asked: NeoxValues) -> dict[str, Any]:
    tanh = asked.get("bias_gelu_fusion")
    asked.notes.append(
        f"bias_gelu_fusion {str(tanh).lower()}: {'tanh' if tanh else 'exact (erf)'} GELU, whatever the checkpoint says"
    )
    asked.idle["rms_norm_epsilon"] = "only used with norm: rmsnorm"
    given = asked.get("intermediate_size") is not None or asked.get("expansion_factor") is not None
    return {
        "ffn_size": width_before_rounding(asked.file.values) if given else None,
        "rotary_fraction": asked.get("rotary_pct"),
        "activation": "gelu_tanh" if tanh else "gelu_erf",
        "residual": "parallel" if asked.get("gpt_j_residual") else "sequential",
        "layernorm_eps": asked.get("layernorm_epsilon"),
    }


def _llama(asked: NeoxValues) -> dict[str, Any]:
    values = asked.file.values
    width, window = gated_width(values), asked.get("sliding_window_width")
    if width is None:
        key = next((key for key in ("intermediate_size", "mlp_multiple_of") if values.get(key)), "hidden_size")
        wanted = width_before_rounding(values)
        raise asked.error(
            key,
            f"GPT-NeoX can't build this MLP: two thirds of {wanted}, {int(wanted * 2 / 3)}, are no two equal parts; for a gate "
            f"{wanted} wide give intermediate_size: {3 * wanted}",
        )
    asked.notes.append(f"activation {values['activation']}: an MLP with a gate {width:,} wide, by GPT-NeoX's rule")
    bias = has_mlp_bias(values)
    if bias and "use_bias_in_mlp" not in values:
        asked.notes.append("use_bias_in_mlp is not given: the MLP has biases, which is GPT-NeoX's default")
    asked.idle["layernorm_epsilon"] = "only used with norm: layernorm"
    asked.idle["bias_gelu_fusion"] = "only used with activation: gelu"
    if values.get("mlp_type") == "llama":
        asked.idle |= dict.fromkeys(("expansion_factor", "mlp_multiple_of", "use_bias_in_mlp"), "not used by mlp_type: llama")
    heads = asked.get("num_kv_heads")
    return {
        "family": "llama" if window is None else "mistral",
        "num_kv_heads": None if not heads or heads == asked.require("num_attention_heads") else heads,
        "ffn_size": width,
        "mlp_bias": bias,
        "layernorm_eps": asked.get("rms_norm_epsilon"),
        **({} if window is None else {"sliding_window": window + 1}),
    }


def _check_attention(asked: NeoxValues) -> None:
    layers = asked.require("num_layers")
    given = asked.get("attention_config")
    if given is None:
        return
    kinds: list[str] = []
    shape = 'a list of [[kinds], count], such as [[["flash"], 24]]; count may be "all"'
    for item in given:
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], list) and item[0]):
            raise asked.error("attention_config", f"{item!r} is not of the form [[kinds], count]: expected {shape}")
        pattern, count = item
        if count == "all":
            count = layers // len(pattern)
        if isinstance(count, bool) or not isinstance(count, int):
            raise asked.error("attention_config", f'count {count!r} is neither a number nor "all": expected {shape}')
        if count > layers:
            described = len(kinds) + len(pattern) * count
            raise asked.error("attention_config", f"describes {described} layers, num_layers is {layers}")
        kinds += pattern * count
    if len(kinds) != layers:
        raise asked.error("attention_config", f"describes {len(kinds)} layers, num_layers is {layers}")
    if other := [kind for kind in kinds if kind not in ("global", "flash")]:
        raise asked.error("attention_config", f"{other[0]!r} can't be honoured: only 'global' and 'flash' attention is known")
