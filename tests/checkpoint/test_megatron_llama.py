"""Llama-like checkpoints of Megatron-LM: read from files that index arithmetic made of transformers' models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from megarewarm.checkpoint.source import open_checkpoint
from megarewarm.errors import UserError
from tests.checkpoint.test_neox_llama import TOKENS, VOCABULARY, WINDOW, hf_config, logits_of, random_model, state_of
from tests.support.llama_shards import Heads, write_megatron

LAYERS, HIDDEN, QUERIES, GATE = 4, 36, 6, 54
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


_COUNTS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def config_of(kind: type[PretrainedConfig], keys: int, **more: Any) -> PretrainedConfig:
    kept = ("vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters", *_COUNTS)
    shape = {key: value for key, value in hf_config(keys).to_dict().items() if key in kept}
    return kind(**shape | {"num_hidden_layers": LAYERS} | more)


# name -> (transformers' model, arguments beside the shape, tensor ranks, pipeline ranks)
CASES: dict[str, tuple[PretrainedConfig, dict[str, Any], int, int]] = {
    "llama": (config_of(LlamaConfig, 2), {}, 1, 1),
    "llama, 2 tensor, 2 stages": (config_of(LlamaConfig, 2), {}, 2, 2),
    "llama, 1:1, 3 tensor": (config_of(LlamaConfig, 6), {"group_query_attention": False, "num_query_groups": 1}, 3, 1),
    "llama, biases, tied": (
        config_of(LlamaConfig, 3, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        {"add_bias_linear": True, "untie_embeddings_and_output_weights": False},
        3,
        4,
    ),
    "llama, scaled": (
        config_of(LlamaConfig, 2, rope_parameters=_LLAMA3),
        {"use_rope_scaling": True, "rope_scaling_factor": 4.0, "rotary_base": 500000},
        2,
        1,
    ),
    "llama, wide heads": (config_of(LlamaConfig, 2, head_dim=10), {"kv_channels": 10}, 2, 1),
    "mistral": (config_of(MistralConfig, 3, sliding_window=WINDOW), {"window_size": (WINDOW - 1, 0)}, 3, 1),
    "qwen2": (config_of(Qwen2Config, 2), {"add_qkv_bias": True}, 2, 1),
    "qwen3": (config_of(Qwen3Config, 2, head_dim=8), {"qk_layernorm": True, "kv_channels": 8}, 2, 2),
}


def arguments(config: PretrainedConfig, tensor: int, pipeline: int) -> dict[str, Any]:
    return {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": GATE,
        "num_attention_heads": QUERIES,
        "group_query_attention": True,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": 6,
        "seq_length": 64,
        "max_position_embeddings": 64,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "rotary_base": 500,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-4,
        "swiglu": True,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "untie_embeddings_and_output_weights": True,
        "padded_vocab_size": VOCABULARY,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "bias_swiglu_fusion": True,
    }


def written(place: Path, name: str, **changes: Any) -> Any:
    config, more, tensor, pipeline = CASES[name]
    model = random_model(config)
    channels = getattr(config, "head_dim", None) or HIDDEN // QUERIES
    heads = Heads(QUERIES, config.num_key_value_heads, channels)
    args = arguments(config, tensor, pipeline) | more | changes
    write_megatron(place, state_of(model), heads, LAYERS, args, tensor=tensor, pipeline=pipeline)
    return model


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    theirs = written(tmp_path, name)
    source = open_checkpoint(str(tmp_path))
    config = source.model_config
    assert source.format == "megatron-lm" and config.family == name.split(",")[0]
    assert config.tie_embeddings == ("tied" in name) and config.sliding_window == (WINDOW if name == "mistral" else None)
    assert (config.rotary_scaling is not None) == ("scaled" in name)
    with torch.no_grad():
        wanted = theirs(TOKENS, use_cache=False).logits
    torch.testing.assert_close(logits_of(source.weights, config, TOKENS), wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("llama", {"swiglu": False}, "normalization is 'RMSNorm', expected 'LayerNorm'"),
        ("llama", {"normalization": "LayerNorm"}, "swiglu is True, expected False"),
        ("llama", {"rotary_percent": 0.5}, r"rotary_percent is 0\.5"),
        ("llama", {"rotary_interleaved": True}, "rotary_interleaved is True"),
        ("llama", {"apply_layernorm_1p": True}, "apply_layernorm_1p is True"),
        ("llama", {"num_experts": 4}, "num_experts is 4"),
        ("llama", {"num_query_groups": 3}, r"num_query_groups is 3 by 'args' and 2 by the tensors"),
        ("llama", {"group_query_attention": False}, r"num_query_groups is 6 by 'args' and 2 by the tensors"),
        ("llama", {"kv_channels": 9}, "are not those of 6 num_attention_heads with 9 channels"),
        ("llama", {"ffn_hidden_size": 50}, "ffn_hidden_size is 50"),
        ("llama", {"qk_layernorm": True}, "qk_layernorm is True, yet no q_layernorm"),
        ("llama", {"window_size": (3, 2)}, r"window_size is \(3, 2\), expected a second number of 0"),
        ("mistral", {"window_attn_skip_freq": 2}, "window_attn_skip_freq is 2"),
        ("llama, biases, tied", {"window_size": (3, 0)}, "in the family 'mistral'"),
        ("llama", {"position_embedding_type": "none"}, "position_embedding_type is 'none'"),
        ("llama", {"softmax_scale": 0.1}, r"softmax_scale is 0\.1"),
    ],
)
def test_other_models_are_refused_in_one_line(name: str, args: dict[str, Any], says: str, tmp_path: Path) -> None:
    written(tmp_path, name, **args)
    with pytest.raises(UserError, match=says) as caught:
        open_checkpoint(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_the_norms_of_older_names_and_no_group_argument(tmp_path: Path) -> None:
    """Models of before Megatron core, as its converters wrote Llama: input_norm, post_attention_norm, final_norm."""
    theirs = written(tmp_path, "llama")
    file = tmp_path / "iter_0000005" / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    del content["args"].group_query_attention
    renamed = {
        "decoder.": "",
        "self_attention.linear_qkv.layer_norm_": "input_norm.",
        "mlp.linear_fc1.layer_norm_": "post_attention_norm.",
        "self_attention.linear_qkv": "self_attention.query_key_value",
        "self_attention.linear_proj": "self_attention.dense",
        "mlp.linear_fc1": "mlp.dense_h_to_4h",
        "mlp.linear_fc2": "mlp.dense_4h_to_h",
        "final_layernorm": "final_norm",
    }
    model: dict[str, Any] = {"encoder": {}}
    for name, tensor in content["model"].items():
        for one, other in renamed.items():
            name = name.replace(one, other)
        if name.startswith("embedding."):
            model["embedding"] = {"word_embeddings": {"weight": tensor}}
        elif name.startswith("output_layer."):
            model["output_layer"] = {"weight": tensor}
        else:
            model["encoder"][name] = tensor
    torch.save(content | {"model": {"language_model": model}}, file)
    source = open_checkpoint(str(tmp_path))
    with torch.no_grad():
        wanted = theirs(TOKENS, use_cache=False).logits
    found = logits_of(source.weights, source.model_config, TOKENS)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))
