"""The config.json of Hugging Face's GPT-NeoX, as transformers 4.x and 5.x wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megarewarm.checkpoint.foreign.huggingface_keys import KEYS
from megarewarm.checkpoint.foreign.huggingface_rotary import read_scaling, refuse_other_scalings, scaling_words
from megarewarm.checkpoint.foreign.recorded_keys import refuse_other_functions, require_agreement
from megarewarm.checkpoint.weights import make_model_config
from megarewarm.config.model import ModelConfig, RotaryScaling
from megarewarm.errors import UserError

_ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_python": "gelu_erf",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}


def read_neox_config(path: Path, raw: Mapping[str, Any]) -> tuple[ModelConfig, list[str]]:
    """The shape in ``raw``, the content of ``path``, and notes on what a reader of it may not expect. Raises UserError naming
    the file and key for a feature NeoX here does not have."""
    if missing := [key for key in SHAPE.values() if raw.get(key) is None]:
        raise UserError(f"{path}: missing {', '.join(repr(key) for key in missing)}")
    refuse_other_functions(str(path), raw, KEYS)
    positions = raw.get("max_position_embeddings", 2048)
    fraction, base, scaling = _rotary(path, raw, positions)
    activation = raw.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise UserError(f"{path}: hidden_act is {activation!r}, expected one of {', '.join(_ACTIVATIONS)}")
    head_dim = raw.get("head_dim")
    if head_dim is not None and head_dim * raw["num_attention_heads"] != raw["hidden_size"]:
        raise UserError(f"{path}: head_dim {head_dim} is not hidden_size / num_attention_heads")
    config = make_model_config(
        str(path),
        **{ours: raw[theirs] for ours, theirs in SHAPE.items()},
        max_positions=positions,
        rotary_fraction=fraction,
        rotary_base=base,
        rotary_scaling=scaling,
        activation=_ACTIVATIONS[activation],
        residual="parallel" if raw.get("use_parallel_residual", True) else "sequential",
        tie_embeddings=raw.get("tie_word_embeddings", False),
        attention_bias=raw.get("attention_bias", True),
        layernorm_eps=raw.get("layer_norm_eps", 1e-5),
        init_std=raw.get("initializer_range", 0.02),
    )
    return config, _notes(raw, activation)


def _rotary(path: Path, raw: Mapping[str, Any], positions: int) -> tuple[float, float, RotaryScaling | None]:
    """(share of a head's channels, base, scaling). Versions of transformers look in different places, which have to agree."""
    places = {}
    scalings: dict[str, RotaryScaling | None] = {}
    for key in ("rope_parameters", "rope_scaling"):
        block = raw.get(key) or {}
        if not isinstance(block, Mapping):
            raise UserError(f"{path}: {key} is {block!r}, expected a mapping")
        places[key] = block
        if block:
            inner = {name: value for name, value in block.items() if name != "partial_rotary_factor"}
            outside = raw.get("original_max_position_embeddings")
            scalings[key] = read_scaling(f"{path}: {key}", inner, outside, positions)
    refuse_other_scalings(path, scalings)
    found = []
    for within, keys, default in (
        ("partial_rotary_factor", ("rotary_pct", "partial_rotary_factor"), 0.25),
        ("rope_theta", ("rotary_emb_base", "rope_theta"), 10000.0),
    ):
        said = {f"{place}.{within}": block.get(within) for place, block in places.items()} | {key: raw.get(key) for key in keys}
        if not any(said[place] is not None for place in said if place != keys[1]):
            said["transformers' default"] = default  # no version reads the second key where the others are missing
        found.append(float(require_agreement(str(path), within, said)))
    return found[0], found[1], next(iter(scalings.values()), None)


SHAPE = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "ffn_size": "intermediate_size",
    "vocab_size": "vocab_size",
}


def _notes(raw: Mapping[str, Any], activation: str) -> list[str]:
    notes = []
    if _ACTIVATIONS[activation] == "gelu_erf":
        notes.append(
            f"hidden_act {activation!r} is the exact GELU; GPT-NeoX trained Pythia with the tanh approximation: "
            "set model.activation to gelu_tanh to continue such a model as it was trained"
        )
    notes += [f"{key} {raw[key]} is not used: megarewarm trains without dropout" for key in _DROPOUT if raw.get(key)]
    return notes


_DROPOUT = ("attention_dropout", "hidden_dropout")


def write_neox_config(config: ModelConfig) -> dict[str, Any]:
    """The keys of ``read_neox_config``, and those that its readers expect beside them."""
    scaling = scaling_words(config.rotary_scaling)
    return {
        **{theirs: getattr(config, ours) for ours, theirs in SHAPE.items()},
        "intermediate_size": config.mlp_size,
        "max_position_embeddings": config.max_positions,
        "hidden_act": "gelu" if config.activation == "gelu_erf" else "gelu_pytorch_tanh",
        "use_parallel_residual": config.residual == "parallel",
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "layer_norm_eps": config.layernorm_eps,
        "initializer_range": config.init_std,
        # transformers 4 reads the first two, transformers 5 the third.
        "rotary_pct": config.rotary_fraction,
        "rotary_emb_base": config.rotary_base,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rotary_base,
            "partial_rotary_factor": config.rotary_fraction,
            **scaling,
        },
        **({"rope_scaling": scaling, "partial_rotary_factor": config.rotary_fraction} if scaling else {}),
    }
