"""Tiny Llama-like models of odd sizes, as transformers makes them: grouped queries 1:1, 2:1, 3:1 and 6:1, windows shorter than
a sequence, positions past the original context."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

VOCABULARY, POSITIONS = 61, 64
_SHAPE: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 36,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 52,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SHAPE, rope_parameters=_LLAMA3),
    "llama, biases, 1:1": LlamaConfig(**_SHAPE | {"num_key_value_heads": 6}, attention_bias=True, mlp_bias=True),
    "llama, tied, 6:1, yarn": LlamaConfig(
        **_SHAPE | {"num_key_value_heads": 1, "head_dim": 10}, rope_parameters=_YARN, tie_word_embeddings=True
    ),
    "llama, linear": LlamaConfig(**_SHAPE | {"num_key_value_heads": 3}, rope_parameters=_LINEAR),
    "mistral": MistralConfig(**_SHAPE, sliding_window=7),
    "mistral, no window": MistralConfig(**_SHAPE | {"head_dim": 4}, sliding_window=None),
    "qwen2": Qwen2Config(**_SHAPE, tie_word_embeddings=True),
    "qwen2, windows": Qwen2Config(**_SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": Qwen3Config(**_SHAPE | {"head_dim": 8}),
    "olmo2": Olmo2Config(**_SHAPE),
    "smollm3": SmolLM3Config(**_SHAPE, no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=6),
}
"""By family and what is particular."""
USUAL = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3")
"""One of each family."""


def random_model(name: str, seed: int = 1) -> PreTrainedModel:
    """transformers' model of ``CONFIGS[name]`` with random weights, none of them zero or one."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(deepcopy(CONFIGS[name]), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter) + float(parameter.dim() == 1))
    return model


def saved(name: str, folder: Path, seed: int = 1, **options: Any) -> PreTrainedModel:
    """``random_model`` after it was written to ``folder``."""
    model = random_model(name, seed)
    model.save_pretrained(folder, **options)
    return model
