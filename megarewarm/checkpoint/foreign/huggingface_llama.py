"""The config.json of Hugging Face's Llama and its relatives, as transformers 4.x and 5.x wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megarewarm.checkpoint.foreign.huggingface_keys import HARMLESS, NOT_HERE
from megarewarm.checkpoint.foreign.recorded_keys import Keys, names, refuse_other_functions, require_agreement
from megarewarm.checkpoint.weights import make_model_config
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
_USUAL = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02}
_ROPE = ("rope_theta", "rope_parameters", "rope_scaling")
_WINDOW = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")


@dataclass(frozen=True)
class LlamaLike:
    """A family's config.json beside what all have. ``options``: keys that are ours by the same name. ``windowed``: it has
    use_sliding_window and layer_types. ``usual``: what transformers takes for a key that is not there; None: it must be."""

    family: str
    options: tuple[str, ...] = ()
    windowed: bool = False
    reads: tuple[str, ...] = ()
    usual: Mapping[str, Any] = field(default_factory=dict)

    def read(self, path: Path, raw: Mapping[str, Any]) -> tuple[ModelConfig, list[str]]:
        """The shape in ``raw``, the content of ``path``, and notes. Raises ``UserError`` naming the file and key for a
        feature that is not there here."""
        usual = _USUAL | dict(self.usual)
        said = {theirs: usual.get(theirs) if raw.get(theirs) is None else raw[theirs] for theirs in _SHAPE.values()}
        needed = (*_REQUIRED, *(key for key, value in self.usual.items() if value is None))
        if missing := [key for key in needed if said.get(key) is None]:
            raise UserError(f"{path}: missing {', '.join(repr(key) for key in missing)}")
        read = {*_SHAPE.values(), *_ROPE, *self.options, *self.reads, *(_WINDOW if self.windowed else ())}
        keys = Keys(
            frozenset({"model_type", "hidden_act", "original_max_position_embeddings", "attention_dropout", *read}),
            NOT_HERE | ({} if self.windowed or "sliding_window" in self.reads else _NO_WINDOW),
            HARMLESS,
            "if it leaves the function alone, remove it from the file",
        )
        refuse_other_functions(str(path), raw, keys)
        if (activation := raw.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise UserError(f"{path}: hidden_act is {activation!r}, expected 'silu': the gate of the MLP is a SwiGLU here")
        values = {ours: said[theirs] for ours, theirs in _SHAPE.items()}
        base, scaling = _rotary(path, raw, int(said["max_position_embeddings"] or 0), usual.get("rope_theta", 10000.0))
        values |= {key: bool(raw.get(key)) for key in self.options}
        values |= {"rotary_base": base, "rotary_scaling": scaling} | self._layers(path, raw)
        config = make_model_config(str(path), family=self.family, **_canonical(values))
        dropout = raw.get("attention_dropout")
        return config, [f"attention_dropout {dropout} is not used: megarewarm trains without dropout"] if dropout else []

    def _layers(self, path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
        """What differs from layer to layer."""
        count, found = raw["num_hidden_layers"], {}
        if "no_rope_layers" in self.reads:
            every = raw.get("no_rope_layer_interval", 4)
            rotated = raw.get("no_rope_layers") or [(i + 1) % every for i in range(count)]
            found["unrotated_layers"] = tuple(i for i, rotates in enumerate(rotated[:count]) if not rotates)
        if "sliding_window" in self.reads:  # Mistral's, in every layer
            return found | {"sliding_window": raw.get("sliding_window", 4096)}
        if not self.windowed:
            return found
        window = raw.get("sliding_window", self.usual.get("sliding_window")) if raw.get("use_sliding_window") else None
        kinds = raw.get("layer_types")
        if kinds is not None and len(kinds) < count:
            raise UserError(f"{path}: layer_types has {len(kinds)} entries for {count} layers")
        if wrong := [kind for kind in kinds or () if kind not in ("full_attention", "sliding_attention")]:
            raise UserError(f"{path}: layer_types has {wrong[0]!r}, expected full_attention or sliding_attention")
        if window is None:
            return found
        if kinds is not None:
            layers = [i for i, kind in enumerate(kinds[:count]) if kind == "sliding_attention"]
        elif "unrotated_layers" in found:
            layers = list(found["unrotated_layers"])
        else:
            layers = list(range(raw.get("max_window_layers", 28), count))
        return found | ({"sliding_window": window, "window_layers": tuple(layers)} if layers else {})

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of ``read``, in both ways in which transformers 4 and 5 read them."""
        scaling = _scaling_words(config.rotary_scaling)
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


def _canonical(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` without what says the same as nothing."""
    out = dict(values)
    if out["num_kv_heads"] == out["num_heads"]:
        out["num_kv_heads"] = None
    if out["head_dim"] is not None and out["head_dim"] * out["num_heads"] == out["hidden_size"]:
        out["head_dim"] = None
    return out


# ours -> theirs, by kind
_SCALING = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_positions": "original_max_position_embeddings",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_positions": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        "truncate": "truncate",
    },
}


def _rotary(path: Path, raw: Mapping[str, Any], positions: int, usual: float) -> tuple[float, RotaryScaling | None]:
    """(base, scaling). Versions of transformers look in different places, which have to agree."""
    bases: dict[str, Any] = {"rope_theta": raw.get("rope_theta")}
    found: dict[str, RotaryScaling | None] = {}
    for key in ("rope_parameters", "rope_scaling"):
        block = raw.get(key)
        if block is None:
            continue
        if not isinstance(block, Mapping):
            raise UserError(f"{path}: {key} is {block!r}, expected a mapping")
        bases[f"{key}.rope_theta"] = block.get("rope_theta")
        found[key] = _scaling(f"{path}: {key}", block, raw.get("original_max_position_embeddings") or positions)
    base = require_agreement(str(path), "rope_theta", bases)
    if len(set(found.values())) > 1:
        raise UserError(f"{path}: rope_parameters and rope_scaling differ: make them agree, or remove one of them")
    return float(usual if base is None else base), next(iter(found.values()), None)


def _scaling(where: str, block: Mapping[str, Any], positions: int) -> RotaryScaling | None:
    """``positions``: what original_max_position_embeddings is where it is not given."""
    kind = block.get("rope_type") or block.get("type") or "default"
    if kind != "default" and kind not in _SCALING:
        raise UserError(f"{where}: rope_type is {kind!r}, expected default, {' or '.join(_SCALING)}")
    ours = _SCALING.get(kind, {})
    known = frozenset({"rope_type", "type", "rope_theta", *ours.values()})
    share = {"partial_rotary_factor": ((None, 1, 1.0), "all channels of a head are rotated in this family")}
    unused = names("original_max_position_embeddings" if kind != "yarn" else "")
    refuse_other_functions(where, block, Keys(known, share, unused, f"it is no key of rope_type {kind!r}"))
    if kind == "default":
        return None
    values = {our: block[their] for our, their in ours.items() if block.get(their) is not None}
    if missing := [key for key in ("factor", "low_freq_factor", "high_freq_factor") if key in ours and key not in values]:
        raise UserError(f"{where}: missing {missing[0]!r}")
    if "original_positions" in ours:
        values.setdefault("original_positions", positions)
    try:
        return RotaryScaling(kind=kind, **values)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _scaling_words(scaling: RotaryScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {}
    said = {their: getattr(scaling, our) for our, their in _SCALING[scaling.kind].items()}
    return {"rope_type": scaling.kind, **{key: value for key, value in said.items() if value is not None}}


LLAMA_LIKE: dict[str, LlamaLike] = {
    "llama": LlamaLike("llama", ("attention_bias", "mlp_bias")),
    "mistral": LlamaLike("mistral", reads=("sliding_window",), usual={"num_key_value_heads": 8}),
    "qwen2": LlamaLike("qwen2", windowed=True, usual={"num_key_value_heads": None, "sliding_window": 4096}),
    "qwen3": LlamaLike(
        "qwen3", ("attention_bias",), True, usual={"num_key_value_heads": None, "head_dim": 128, "sliding_window": 4096}
    ),
    "olmo2": LlamaLike("olmo2", ("attention_bias",), usual={"rms_norm_eps": 1e-5}),
    "smollm3": LlamaLike(
        "smollm3",
        ("attention_bias", "mlp_bias"),
        True,
        reads=("no_rope_layers", "no_rope_layer_interval"),
        usual={"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True},
    ),
}
"""By model_type."""
assert set(LLAMA_LIKE) == set(FAMILIES) - {"neox"}
