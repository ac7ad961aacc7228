"""Hugging Face's model types: how each one's config.json is read and written, and what its tensors are called.

A new one whose parts are those of model/llama.py is an entry here, and one in ``config/families.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megarewarm.checkpoint.foreign.huggingface_llama import LLAMA_LIKE
from megarewarm.checkpoint.foreign.huggingface_neox import read_neox_config, write_neox_config
from megarewarm.config.model import ModelConfig
from megarewarm.errors import UserError
from megarewarm.model.parameters import EMBEDDING, HEAD

_IN_LAYER = re.compile(r"(layers\.\d+)\.(.+)\.(weight|bias)")
_LLAMA_LAYER = {
    "attention_norm": ("input_layernorm",),
    "attention.query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.query_norm": ("self_attn.q_norm",),
    "attention.key_norm": ("self_attn.k_norm",),
    "attention.dense": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}


@dataclass(frozen=True)
class ModelType:
    """``in_layer``: our modules in a layer, and theirs, several where ours holds their rows in turn; others have one name.
    ``outside``: parameters outside of the layers. ``prefix``: of all names but the head's."""

    name: str
    architecture: str
    read: Callable[[Path, Mapping[str, Any]], tuple[ModelConfig, list[str]]]
    write: Callable[[ModelConfig], dict[str, Any]]
    prefix: str
    in_layer: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    outside: Mapping[str, str] = field(default_factory=dict)

    def stored(self, name: str) -> tuple[str, ...]:
        """Their names of our parameter ``name``, in the order of ``Card.interleaved``."""
        if (inside := _IN_LAYER.fullmatch(name)) is not None:
            layer, module, kind = inside.groups()
            return tuple(f"{self.prefix}{layer}.{theirs}.{kind}" for theirs in self.in_layer.get(module, (module,)))
        theirs = self.outside.get(name, name)
        return (theirs if name == HEAD else self.prefix + theirs,)


def _llama(name: str, architecture: str, **other: tuple[str, ...]) -> ModelType:
    like = LLAMA_LIKE[name]
    outside = {EMBEDDING: "embed_tokens.weight", "final_layer_norm.weight": "norm.weight", HEAD: "lm_head.weight"}
    return ModelType(name, f"{architecture}ForCausalLM", like.read, like.write, "model.", _LLAMA_LAYER | other, outside)


MODEL_TYPES: dict[str, ModelType] = {
    kind.name: kind
    for kind in (
        ModelType("gpt_neox", "GPTNeoXForCausalLM", read_neox_config, write_neox_config, "gpt_neox."),
        _llama("llama", "Llama"),
        _llama("mistral", "Mistral"),
        _llama("qwen2", "Qwen2"),
        _llama("qwen3", "Qwen3"),
        _llama("olmo2", "Olmo2", attention_norm=("post_attention_layernorm",), mlp_norm=("post_feedforward_layernorm",)),
        _llama("smollm3", "SmolLM3"),
    )
}
_NEAREST = {
    **dict.fromkeys(("gpt", "bloom", "opt", "falcon", "codegen", "stablelm"), "gpt_neox"),
    **dict.fromkeys(("mixtral", "ministral", "mistral"), "mistral"),
    "olmo": "olmo2",
    "qwen2": "qwen2",
    "qwen": "qwen3",
    "smollm": "smollm3",
}
"""By how the name of a model type begins; the nearest to all others is llama."""
_PARTICULAR = (
    *("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size"),
    *("final_logit_softcapping", "attn_logit_softcapping", "kv_lora_rank", "partial_rotary_factor"),
    *("state_size", "ssm_cfg", "mamba_d_state", "linear_num_key_heads", "n_embd", "vision_config", "text_config"),
)
"""Keys that say what such a model has beyond the parts there are here."""


def model_type_of(path: Path, raw: Mapping[str, Any]) -> ModelType:
    """The entry for a config.json. Raises ``UserError`` for a model type that can't be loaded."""
    name = raw.get("model_type")
    if not isinstance(name, str):
        raise UserError(f"{path}: model_type is {str(name)[:40]!r}, expected one of {', '.join(MODEL_TYPES)}")
    if name in MODEL_TYPES:
        return MODEL_TYPES[name]
    near = next((family for start, family in _NEAREST.items() if name.startswith(start)), "llama")
    has = [f"{key} {raw[key]}" if isinstance(raw[key], int | float) else key for key in _PARTICULAR if raw.get(key)]
    raise UserError(
        f"{path}: model_type is {name[:40]!r}{f' ({has[0]})' if has else ''}, expected one of {', '.join(MODEL_TYPES)}; the "
        f"nearest one that works is '{near}'"
    )


def model_type_of_family(config: ModelConfig) -> ModelType:
    """As which a model is written."""
    return MODEL_TYPES["gpt_neox" if config.family == "neox" else config.family]
