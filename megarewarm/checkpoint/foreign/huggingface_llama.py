"""The config.json of Hugging Face's Llama and its relatives, as transformers 4.x and 5.x wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megarewarm.checkpoint.foreign.huggingface_keys import HARMLESS, NOT_HERE
from megarewarm.checkpoint.foreign.huggingface_rotary import WHOLE_HEADS, read_scaling, refuse_other_scalings, scaling_words
from megarewarm.checkpoint.foreign.json_file import FLAG, LIST, MAPPING, NUMBER, WHOLE, Kind, require_kinds
from megarewarm.checkpoint.foreign.recorded_keys import Keys, refuse_other_functions, require_agreement
from megarewarm.checkpoint.weights import make_model_config, refuse_too_many_layers
from megarewarm.config.families import FAMILIES
from megarewarm.config.model import ModelConfig, RotaryScaling
from megarewarm.errors import UserError

_SHAPE = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "layernorm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}
_REQUIRED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
_USUAL = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02, "rope_theta": 10000.0}
_NULLABLE = ("num_key_value_heads", "head_dim", "sliding_window")
"""Where null is no default: as many as num_attention_heads, hidden_size / num_attention_heads, no window."""
_ROPE = ("rope_theta", "rope_parameters", "rope_scaling")
_WINDOW = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
_KINDS: dict[Kind, str] = {
    WHOLE: f"{' '.join(_REQUIRED)} num_key_value_heads head_dim max_position_embeddings sliding_window max_window_layers "
    "no_rope_layer_interval original_max_position_embeddings",
    NUMBER: "rms_norm_eps initializer_range rope_theta attention_dropout",
    FLAG: "tie_word_embeddings use_sliding_window attention_bias mlp_bias",
    LIST: "layer_types no_rope_layers",
    MAPPING: "rope_parameters rope_scaling",
}


@dataclass(frozen=True)
class LlamaLike:
    """A family's config.json beside what all have. ``options``: keys that are ours by the same name. ``windowed``: it has
    use_sliding_window and layer_types. ``usual``: what transformers takes for a key that is not there."""

    family: str
    options: tuple[str, ...] = ()
    windowed: bool = False
    reads: tuple[str, ...] = ()
    usual: Mapping[str, Any] = field(default_factory=dict)

    def read(self, path: Path, raw: Mapping[str, Any]) -> tuple[ModelConfig, list[str]]:
        """The shape in ``raw``, the content of ``path``, and notes. Raises ``UserError`` naming the file and key for a
        feature that is not there here."""
        require_kinds(str(path), raw, _KINDS)
        said = _USUAL | dict(self.usual) | {key: raw[key] for key in raw if raw[key] is not None or key in _NULLABLE}
        needed = (*_REQUIRED, *(("head_dim",) if self.usual.get("head_dim") else ()))
        if missing := [key for key in needed if said.get(key) is None]:
            raise UserError(f"{path}: missing {', '.join(repr(key) for key in missing)}")
        refuse_too_many_layers(str(path), "num_hidden_layers", said["num_hidden_layers"])
        read = {*_SHAPE.values(), *_ROPE, *self.options, *self.reads, *(_WINDOW if self.windowed else ())}
        keys = Keys(
            frozenset({"model_type", "hidden_act", "original_max_position_embeddings", "attention_dropout", *read}),
            NOT_HERE | WHOLE_HEADS | ({} if self.windowed or "sliding_window" in self.reads else _NO_WINDOW),
            HARMLESS,
            "if it leaves the function alone, remove it from the file",
        )
        refuse_other_functions(str(path), _without_full_attention(raw) if not self.windowed else raw, keys)
        if (activation := raw.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise UserError(f"{path}: hidden_act is {activation!r}, expected 'silu': the gate of the MLP is a SwiGLU here")
        values = {ours: said.get(theirs) for ours, theirs in _SHAPE.items()}
        base, scaling = _rotary(path, raw, said["max_position_embeddings"], said["rope_theta"])
        values |= {key: bool(raw.get(key)) for key in self.options}
        values |= {"rotary_base": base, "rotary_scaling": scaling} | self._layers(path, said)
        config = make_model_config(str(path), _SHAPE, family=self.family, **_canonical(values))
        dropout = raw.get("attention_dropout")
        return config, [f"attention_dropout {dropout} is not used: megarewarm trains without dropout"] if dropout else []

    def _layers(self, path: Path, said: Mapping[str, Any]) -> dict[str, Any]:
        """What differs from layer to layer. ``said``: with transformers' defaults."""
        count: int = said["num_hidden_layers"]
        found: dict[str, Any] = {}
        if "no_rope_layers" in self.reads:
            every = said["no_rope_layer_interval"]
            if every < 1:
                raise UserError(f"{path}: no_rope_layer_interval is {every}, expected 1 or more")
            rotated = said.get("no_rope_layers") or [(i + 1) % every for i in range(count)]
            if len(rotated) < count:
                raise UserError(f"{path}: no_rope_layers has {len(rotated)} entries for {count} layers: one for each is needed")
            found["unrotated_layers"] = tuple(i for i, rotates in enumerate(rotated[:count]) if not rotates)
        window = said.get("sliding_window")
        if not self.windowed:  # Mistral's is in every layer
            return found | ({"sliding_window": window} if "sliding_window" in self.reads else {})
        window = window if said.get("use_sliding_window") else None
        kinds = said.get("layer_types")
        if kinds is not None and len(kinds) != count:
            raise UserError(f"{path}: layer_types has {len(kinds)} entries for {count} layers: one for each is needed")
        if wrong := [kind for kind in kinds or () if kind not in ("full_attention", "sliding_attention")]:
            raise UserError(f"{path}: layer_types has {wrong[0]!r}, expected full_attention or sliding_attention")
        if kinds is not None:
            layers = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
            if layers and window is None:
                raise UserError(
                    f"{path}: layer_types has 'sliding_attention', yet use_sliding_window and sliding_window give no window: "
                    f"set both, or all of layer_types to 'full_attention'"
                )
        elif "unrotated_layers" in found:
            layers = found["unrotated_layers"]
        else:
            layers = tuple(range(said["max_window_layers"], count))
        if window is None or not layers:
            return found
        return found | {"sliding_window": window, "window_layers": None if len(layers) == count else layers}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of ``read``, in both ways in which transformers 4 and 5 read them."""
        scaling = scaling_words(config.rotary_scaling)
        values = {theirs: getattr(config, ours) for ours, theirs in _SHAPE.items()} | {
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_width,
            "intermediate_size": config.mlp_size,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "rope_theta": config.rotary_base,
            "rope_scaling": scaling or None,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base, **scaling},
            **{key: getattr(config, key) for key in self.options},
        }
        if "no_rope_layers" in self.reads:
            values["no_rope_layers"] = [int(i not in config.unrotated_layers) for i in range(config.num_layers)]
        if "sliding_window" in self.reads:
            values["sliding_window"] = config.sliding_window
        if self.windowed:
            windows = [config.window_of(i) is not None for i in range(config.num_layers)]
            values |= {
                "use_sliding_window": any(windows),
                "sliding_window": config.sliding_window,
                "max_window_layers": windows.index(True) if any(windows) else config.num_layers,
                "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
            }
        return values


_NO_WINDOW: dict[str, tuple[tuple[Any, ...], str]] = {
    "sliding_window": ((None, False), "attention in this family is over all earlier positions; mistral has a window"),
    "layer_types": ((None, False), "all layers in this family are of one kind"),
}


def _without_full_attention(raw: Mapping[str, Any]) -> dict[str, Any]:
    """``raw`` without layer_types that say what is so anyway."""
    kinds = raw.get("layer_types")
    plain = isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)
    return {key: value for key, value in raw.items() if not (key == "layer_types" and plain)}


def _canonical(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` without what says the same as nothing."""
    out = dict(values)
    if out["num_kv_heads"] == out["num_heads"]:
        out["num_kv_heads"] = None
    if out["head_dim"] is not None and out["head_dim"] * out["num_heads"] == out["hidden_size"]:
        out["head_dim"] = None
    return out


def _rotary(path: Path, raw: Mapping[str, Any], positions: int, usual: float) -> tuple[float, RotaryScaling | None]:
    """(base, scaling). Versions of transformers look in different places, which have to agree. ``positions``, ``usual``: of
    the model, and the base, where they are not given."""
    bases: dict[str, Any] = {"rope_theta": raw.get("rope_theta")}
    found: dict[str, RotaryScaling | None] = {}
    for key in ("rope_parameters", "rope_scaling"):
        block = raw.get(key)
        if not block:
            continue
        require_kinds(f"{path}: {key}", block, {NUMBER: "rope_theta"})
        bases[f"{key}.rope_theta"] = block.get("rope_theta")
        found[key] = read_scaling(f"{path}: {key}", block, raw.get("original_max_position_embeddings"), positions)
    base = require_agreement(str(path), "rope_theta", bases)
    refuse_other_scalings(path, found)
    return float(usual if base is None else base), next(iter(found.values()), None)


_QWEN = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
LLAMA_LIKE: dict[str, LlamaLike] = {
    "llama": LlamaLike("llama", ("attention_bias", "mlp_bias"), usual={"max_position_embeddings": 2048}),
    "mistral": LlamaLike(
        "mistral",
        reads=("sliding_window",),
        usual={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": LlamaLike("qwen2", windowed=True, usual=_QWEN),
    "qwen3": LlamaLike("qwen3", ("attention_bias",), windowed=True, usual=_QWEN | {"head_dim": 128}),
    "olmo2": LlamaLike("olmo2", ("attention_bias",), usual={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}),
    "smollm3": LlamaLike(
        "smollm3",
        ("attention_bias", "mlp_bias"),
        windowed=True,
        reads=("no_rope_layers", "no_rope_layer_interval"),
        usual={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
        },
    ),
}
"""By model_type."""
assert set(LLAMA_LIKE) == set(FAMILIES) - {"neox"}
