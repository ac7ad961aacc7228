"""config.json of published models and of models that can't be loaded, and random ones: as transformers reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megarewarm.checkpoint.foreign.families import MODEL_TYPES
from megarewarm.checkpoint.foreign.huggingface import read_model_config
from megarewarm.checkpoint.source import open_checkpoint
from megarewarm.config.families import FAMILIES
from megarewarm.config.load import read_configs
from megarewarm.config.model import ModelConfig
from megarewarm.errors import UserError
from megarewarm.main import main
from megarewarm.model.positions import positions_of
from megarewarm.model.size import count_parameters

ROOT = Path(__file__).resolve().parents[2]
_ALL: dict[str, Any] = {"hidden_act": "silu", "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}


def _of(architecture: str, shape: str, more: str) -> dict[str, Any]:
    """``shape``: layers, width, heads, heads of keys, MLP, vocabulary, positions. ``more``: JSON, without its braces."""
    names = "num_hidden_layers hidden_size num_attention_heads num_key_value_heads intermediate_size vocab_size"
    sizes = dict(zip([*names.split(), "max_position_embeddings"], map(int, shape.split()), strict=True))
    kind = architecture.removesuffix("ForCausalLM").lower()
    return {"architectures": [architecture], "model_type": kind, **_ALL, **sizes, **json.loads(f"{{{more}}}")}


# The keys of the files on the hub, as public repositories quote them, and the number of parameters of their model cards.
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "meta-llama/Llama-3.2-1B": (
        1_235_814_400,
        _of(
            "LlamaForCausalLM",
            "16 2048 32 8 8192 128256 131072",
            '"attention_bias": false, "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "mlp_bias": '
            'false, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": '
            '4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}, '
            '"rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": '
            '"4.45.0.dev0"',
        ),
    ),
    "meta-llama/Llama-2-7b-hf": (
        6_738_415_616,
        _of(
            "LlamaForCausalLM",
            "32 4096 32 32 11008 32000 4096",
            '"_name_or_path": "meta-llama/Llama-2-7b-hf", "bos_token_id": 1, "eos_token_id": 2, "pretraining_tp": 1, '
            '"rms_norm_eps": 1e-05, "rope_scaling": null, "tie_word_embeddings": false, "torch_dtype": "float16", '
            '"transformers_version": "4.31.0.dev0"',
        ),
    ),
    "TinyLlama/TinyLlama_v1.1": (
        1_100_048_384,
        _of(
            "LlamaForCausalLM",
            "22 2048 32 4 5632 32000 2048",
            '"attention_bias": false, "bos_token_id": 1, "eos_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": '
            '1e-05, "rope_scaling": null, "rope_theta": 10000.0, "tie_word_embeddings": false, "torch_dtype": '
            '"float32"',
        ),
    ),
    "mistralai/Mistral-7B-v0.1": (
        7_241_732_096,
        _of(
            "MistralForCausalLM",
            "32 4096 32 8 14336 32000 32768",
            '"bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": '
            '4096, "tie_word_embeddings": false, "torch_dtype": "bfloat16"',
        ),
    ),
    "mistralai/Mistral-7B-v0.3": (
        7_248_023_552,
        _of(
            "MistralForCausalLM",
            "32 4096 32 8 14336 32768 32768",
            '"rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": null, "tie_word_embeddings": false, '
            '"torch_dtype": "bfloat16"',
        ),
    ),
    "Qwen/Qwen2.5-0.5B": (
        494_032_768,
        _of(
            "Qwen2ForCausalLM",
            "24 896 14 2 4864 151936 32768",
            '"bos_token_id": 151643, "eos_token_id": 151643, "max_window_layers": 24, "rms_norm_eps": 1e-06, '
            '"rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": '
            '"bfloat16", "use_mrope": false, "use_sliding_window": false',
        ),
    ),
    "Qwen/Qwen3-0.6B": (
        596_049_920,
        _of(
            "Qwen3ForCausalLM",
            "28 1024 16 8 3072 151936 40960",
            '"attention_bias": false, "head_dim": 128, "max_window_layers": 28, "rms_norm_eps": 1e-06, '
            '"rope_scaling": null, "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true, '
            '"torch_dtype": "bfloat16", "use_sliding_window": false',
        ),
    ),
    "allenai/OLMo-2-0425-1B": (
        1_484_916_736,
        _of(
            "Olmo2ForCausalLM",
            "16 2048 16 16 8192 100352 4096",
            '"attention_bias": false, "eos_token_id": 100257, "pad_token_id": 100277, "rms_norm_eps": 1e-06, '
            '"rope_scaling": null, "rope_theta": 500000, "tie_word_embeddings": false, "torch_dtype": "float32"',
        ),
    ),
    "HuggingFaceTB/SmolLM2-135M": (
        134_515_008,
        _of(
            "LlamaForCausalLM",
            "30 576 9 3 1536 49152 8192",
            '"initializer_range": 0.041666666666666664, "attention_bias": false, "bos_token_id": 0, "eos_token_id": '
            '0, "is_llama_config": true, "mlp_bias": false, "pretraining_tp": 1, "rms_norm_eps": 1e-05, '
            '"rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000, "tie_word_embeddings": true, '
            '"torch_dtype": "bfloat16"',
        ),
    ),
    "HuggingFaceTB/SmolLM3-3B-Base": (
        3_075_098_624,
        _of(
            "SmolLM3ForCausalLM",
            "36 2048 16 4 11008 128256 65536",
            '"attention_bias": false, "bos_token_id": null, "eos_token_id": 128001, "max_window_layers": 28, '
            '"mlp_bias": false, "no_rope_layer_interval": 4, "pad_token_id": 128004, "pretraining_tp": 2, '
            '"rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 5000000.0, "sliding_window": null, '
            '"torch_dtype": "bfloat16", "use_sliding_window": false',
        )
        | {"layer_types": ["full_attention"] * 36, "no_rope_layers": [1, 1, 1, 0] * 9},
    ),
}
PRESETS = {
    "smollm2_135m": "HuggingFaceTB/SmolLM2-135M",
    "llama3_1b": "meta-llama/Llama-3.2-1B",
    "qwen2.5_0.5b": "Qwen/Qwen2.5-0.5B",
}


def written(folder: Path, raw: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def frequencies(config: ModelConfig) -> torch.Tensor:
    """The angles at position 1, and what cosines and sines are multiplied by."""
    found = positions_of(2, config, torch.zeros(1))
    return torch.stack([torch.atan2(found.sin[1], found.cos[1]), found.cos[0]])


def assert_same_function(ours: ModelConfig, theirs: PretrainedConfig) -> None:
    """By what transformers' modules take from ``theirs``."""
    layers = range(ours.num_layers)
    assert theirs.num_hidden_layers == ours.num_layers and theirs.vocab_size == ours.vocab_size
    assert (theirs.hidden_size, theirs.intermediate_size) == (ours.hidden_size, ours.mlp_size)
    assert (theirs.num_attention_heads, theirs.num_key_value_heads) == (ours.num_heads, ours.kv_heads)
    assert (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads) == ours.head_width
    assert (theirs.rms_norm_eps, theirs.tie_word_embeddings) == (ours.layernorm_eps, ours.tie_embeddings)
    assert theirs.max_position_embeddings == ours.max_positions and theirs.initializer_range == ours.init_std
    assert getattr(theirs, "attention_bias", ours.family == "qwen2") == ours.attention_bias
    assert getattr(theirs, "mlp_bias", False) == ours.mlp_bias
    kind = theirs.rope_parameters["rope_type"]
    if kind == "default":
        dims = torch.arange(0, ours.head_width, 2).float() / ours.head_width
        angles, factor = 1 / theirs.rope_parameters["rope_theta"] ** dims, 1.0
    else:
        angles, factor = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
    torch.testing.assert_close(frequencies(ours), torch.stack([angles, torch.full_like(angles, factor)]), rtol=1e-5, atol=0)
    kinds = getattr(theirs, "layer_types", None)
    everywhere = theirs.sliding_window if ours.family == "mistral" else None
    windows = [theirs.sliding_window if kind == "sliding_attention" else None for kind in kinds or ()] or [everywhere] * len(
        layers
    )
    assert windows == [ours.window_of(i) for i in layers]
    assert [int(i not in ours.unrotated_layers) for i in layers] == getattr(theirs, "no_rope_layers", [1] * len(layers))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_read(name: str, tmp_path: Path) -> None:
    count, raw = PUBLISHED[name]
    config, notes = read_model_config(written(tmp_path, raw))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert notes == [] and count_parameters(config) == count
    assert_same_function(config, theirs)
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(theirs).num_parameters() == count
    # and what we write of it, in both versions' words
    again, _ = read_model_config(
        written(tmp_path, {"model_type": raw["model_type"], **MODEL_TYPES[raw["model_type"]].write(config)})
    )
    assert again == config
    assert_same_function(config, AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_published_models(preset: str, tmp_path: Path) -> None:
    path = ROOT / "configs" / "llama" / f"{preset}.yml"
    count, raw = PUBLISHED[PRESETS[preset]]
    mapping, _ = read_configs([str(path)])
    config = ModelConfig(**mapping["model"])
    assert config == read_model_config(written(tmp_path, raw))[0]
    assert count_parameters(config) == count and f"{count:,} parameters" in path.read_text()


# ---- refusals ------------------------------------------------------------------------------------------------------

_BASE = PUBLISHED["meta-llama/Llama-3.2-1B"][1]
_QWEN3 = PUBLISHED["Qwen/Qwen3-0.6B"][1]
_SMOLLM3 = PUBLISHED["HuggingFaceTB/SmolLM3-3B-Base"][1]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mixtral": (
        {"model_type": "mixtral", "num_local_experts": 8},
        r"model_type is 'mixtral' \(num_local_experts 8\).* 'mistral'",
    ),
    "qwen2_moe": ({"model_type": "qwen2_moe", "num_experts": 60}, r"'qwen2_moe' \(num_experts 60\).* works is 'qwen2'"),
    "qwen3_moe": ({"model_type": "qwen3_moe", "num_experts": 128}, r"'qwen3_moe' \(num_experts 128\).* works is 'qwen3'"),
    "gemma2": (
        {"model_type": "gemma2", "final_logit_softcapping": 30.0},
        r"'gemma2' \(final_logit_softcapping 30.0\).* works is 'llama'",
    ),
    "gemma3": ({"model_type": "gemma3", "text_config": {"x": 1}}, r"'gemma3' \(text_config\).* works is 'llama'"),
    "phi3": ({"model_type": "phi3"}, "'phi3'.* works is 'llama'"),
    "mamba": ({"model_type": "mamba", "state_size": 16}, r"'mamba' \(state_size 16\)"),
    "deepseek": ({"model_type": "deepseek_v3", "n_routed_experts": 256}, r"'deepseek_v3' \(n_routed_experts 256\).* 'llama'"),
    "gpt2": ({"model_type": "gpt2", "n_embd": 768}, "'gpt2'.* works is 'gpt_neox'"),
    "no type": ({"model_type": None}, "model_type is 'None', expected one of"),
    "a list for a type": ({"model_type": ["llama"]}, "model_type is .*, expected one of"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config is .* take the unquantized model"),
    "soft cap": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    "experts in a llama": ({"num_local_experts": 4}, "num_local_experts is 4"),
    "dynamic": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_scaling: rope_type is 'dynamic', expected default, linear",
    ),
    "longrope": ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "rope_type is 'longrope'"),
    "unknown": ({"rope_scaling": {"rope_type": "spiral"}}, "rope_type is 'spiral'"),
    "a type that is no word": ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type is"),
    "mrope": ({"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, r"mrope_section is \[16, 24, 24\]"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, expected 1"),
    "partial inside": (
        {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor is 0.5",
    ),
    "no factor": ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: missing 'factor'"),
    "factor of words": ({"rope_scaling": {"rope_type": "linear", "factor": "two"}}, "rope_scaling: factor: "),
    "two of a kind": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 3.0}},
        "rope_parameters and rope_scaling differ",
    ),
    "two bases": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        r"rope_theta is 500000.0 by rope_theta and 10000.0",
    ),
    "two original lengths": (
        {"original_max_position_embeddings": 4096},
        "original_max_position_embeddings is 8192 by this block",
    ),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    "window": ({"sliding_window": 4096}, "sliding_window is 4096.*mistral has a window"),
    "kinds of layers": ({"layer_types": ["chunked_attention"] * 16}, "layer_types is"),
    "heads": ({"num_key_value_heads": 5}, "num_attention_heads 32 is not divisible by num_key_value_heads 5"),
    "width": ({"num_attention_heads": 24, "head_dim": None}, "hidden_size 2048 is not divisible by num_attention_heads 24"),
    "width, head_dim": ({"num_attention_heads": 24}, "hidden_size 2048 is not divisible by num_attention_heads 24"),
    "words": ({"hidden_size": "2048"}, "hidden_size is '2048', expected a whole number"),
    "a number for a switch": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers: "),
    "layers without end": ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, expected 10,000 at most"),
    "not causal": ({"is_causal": False}, "is_causal is False"),
    "code": ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map is"),
    "scales": ({"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0"),
}
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "unknown kind": (
        _QWEN3,
        {"layer_types": ["linear_attention"] * 28},
        "layer_types has 'linear_attention', expected full_attention",
    ),
    "too few kinds": (_QWEN3, {"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries for 28 layers"),
    "a window of no size": (_QWEN3, {"layer_types": ["sliding_attention"] * 28}, "layer_types has 'sliding_attention', yet"),
    "no head_dim": (_QWEN3, {"head_dim": None}, "missing 'head_dim'"),
    "rotated": (_SMOLLM3, {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for 36 layers"),
    "interval": (_SMOLLM3, {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
    "layers without end": (_SMOLLM3, {"num_hidden_layers": 10**12}, "expected 10,000 at most"),
    "bias": (PUBLISHED["mistralai/Mistral-7B-v0.1"][1], {"attention_bias": True}, "attention_bias is True"),
}
_CASES = {name: (_BASE, *case) for name, case in REFUSED.items()} | {
    f"{name} of another": case for name, case in OTHERS.items()
}


@pytest.mark.parametrize("name", _CASES)
def test_what_can_not_be_loaded_is_refused_by_its_key(name: str, tmp_path: Path) -> None:
    base, changes, message = _CASES[name]
    written(tmp_path, base | changes)
    with pytest.raises(UserError, match=rf"config\.json: .*{message}") as found:
        open_checkpoint(str(tmp_path))
    assert "\n" not in str(found.value)


def test_a_refusal_ends_with_code_2_and_nothing_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "start").mkdir()
    written(tmp_path / "start", _BASE | {"model_type": "gemma2", "final_logit_softcapping": 30.0})
    run = {
        "name": "r",
        "folder": str(tmp_path / "run"),
        "start": {"from": str(tmp_path / "start")},
        "data": {"sequence_length": 16, "train": [{"path": str(tmp_path / "none")}]},
        "schedule": {"curve": "cosine", "max_lr": 1e-3, "min_lr": 0},
        "training": {"budget": 4, "global_batch": 4, "micro_batch": 4},
    }
    (tmp_path / "run.yml").write_text(json.dumps(run))
    before = sorted(tmp_path.rglob("*"))
    assert main([str(tmp_path / "run.yml")]) == 2
    shown = capsys.readouterr().err.strip()
    assert shown.count("\n") == 0 and "final_logit_softcapping 30.0" in shown, shown
    assert sorted(tmp_path.rglob("*")) == before


# ---- random models -------------------------------------------------------------------------------------------------


@st.composite
def scalings(draw: st.DrawFn) -> dict[str, Any] | None:
    kind = draw(st.sampled_from([None, "linear", "llama3", "yarn"]))
    if kind is None:
        return None
    found: dict[str, Any] = {"kind": kind, "factor": draw(st.floats(1, 64))}
    if kind == "linear":
        return found
    found["original_positions"] = draw(st.integers(8, 8192))
    if kind == "llama3":
        low = draw(st.floats(0.25, 4))
        return found | {"low_freq_factor": low, "high_freq_factor": low + draw(st.floats(0.5, 8))}
    if draw(st.booleans()):
        found |= {"mscale": draw(st.floats(0.1, 2)), "mscale_all_dim": draw(st.floats(0.1, 2))}
    slow = draw(st.floats(0.5, 4))
    found |= {"beta_slow": slow, "beta_fast": slow + draw(st.floats(1, 60)), "truncate": draw(st.booleans())}
    return found | {"attention_factor": draw(st.none() | st.floats(0.5, 2))}


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """A valid model of any family, where what says the same is said in one way."""
    family = draw(st.sampled_from(sorted(set(FAMILIES) - {"neox"})))
    parts = FAMILIES[family].parts
    keys, group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    heads, layers = keys * group, draw(st.integers(1, 6))
    width = 2 * draw(st.integers(1, 8)) * heads
    head_dim = draw(st.none() | st.integers(1, 16).map(lambda half: 2 * half)) if "head_dim" not in parts else None
    if head_dim is not None and head_dim * heads == width:
        head_dim = None
    values: dict[str, Any] = {
        "family": family,
        "num_layers": layers,
        "hidden_size": width,
        "num_heads": heads,
        "num_kv_heads": keys if group > 1 else None,
        "head_dim": head_dim,
        "ffn_size": draw(st.integers(1, 64)),
        "vocab_size": draw(st.integers(1, 300)),
        "max_positions": draw(st.integers(1, 100_000)),
        "rotary_base": draw(st.floats(100, 1e7)),
        "rotary_scaling": draw(scalings()),
        "layernorm_eps": draw(st.floats(1e-12, 1e-2)),
        "init_std": draw(st.floats(0.001, 0.9)),
        "tie_embeddings": draw(st.booleans()),
    }
    for key in ("attention_bias", "mlp_bias"):
        values[key] = draw(st.sampled_from(parts[key]))
    some = st.lists(st.integers(0, layers - 1), unique=True).map(lambda found: tuple(sorted(found)))
    if "sliding_window" not in parts and draw(st.booleans()):
        values["sliding_window"] = draw(st.integers(1, 5000))
        if "window_layers" not in parts:
            windows = draw(some)
            assume(windows)
            values["window_layers"] = None if len(windows) == layers else windows
    if "unrotated_layers" not in parts:
        values["unrotated_layers"] = draw(some)
    return ModelConfig(**values)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(config=models(), version=st.sampled_from([0, 4, 5]))
def test_what_is_written_is_read_again_by_us_and_by_transformers(config: ModelConfig, version: int, tmp_path: Path) -> None:
    """``version``: with the keys of that version of transformers alone."""
    raw = {"model_type": config.family, **MODEL_TYPES[config.family].write(config)}
    if version == 4:
        del raw["rope_parameters"]
    elif version == 5:
        del raw["rope_theta"], raw["rope_scaling"]
    ours, notes = read_model_config(written(tmp_path, raw))
    assert ours == config and notes == []
    theirs = AutoConfig.from_pretrained(tmp_path)
    assume(config.rotary_scaling is None or math.isfinite(float(frequencies(config).sum())))
    assert_same_function(config, theirs)
