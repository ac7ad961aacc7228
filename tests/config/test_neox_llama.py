"""GPT-NeoX configurations of Llama-like models: its published ones, its rule for the MLP's width, and what is in no family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megarewarm.config.model import ModelConfig
from megarewarm.config.neox_family import gated_width
from megarewarm.errors import UserError
from megarewarm.model.size import count_parameters
from megarewarm.rewarm.neox_start import load_neox
from tests.checkpoint.test_convert import tool
from tests.config.test_neox_config import SMALL

# The shape keys of GPT-NeoX's files for these models: sizes by the models' papers, intermediate sizes its own.
COMMON: dict[str, Any] = {
    "pipe_parallel_size": 1,
    "model_parallel_size": 1,
    "make_vocab_size_divisible_by": 1,
    "pos_emb": "rotary",
    "rotary_pct": 1,
    "no_weight_tying": True,
    "gpt_j_residual": False,
    "output_layer_parallelism": "column",
    "norm": "rmsnorm",
    "scaled_upper_triang_masked_softmax_fusion": True,
    "bias_gelu_fusion": False,
    "use_bias_in_norms": False,
    "use_bias_in_attn_linear": False,
    "activation": "swiglu",
    "mlp_multiple_of": 256,
}


def shape(layers: int, hidden: int, heads: int, wide: int | None, length: int = 2048, **more: Any) -> dict[str, Any]:
    sizes = {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "seq_length": length}
    width = {} if wide is None else {"intermediate_size": wide}
    return COMMON | sizes | width | {"max_position_embeddings": length, "rms_norm_epsilon": 1e-5} | more


FIRST: dict[str, Any] = {"use_bias_in_mlp": False, "rms_norm_epsilon": 1e-6}
FLASH: dict[str, Any] = {"rotary_emb_base": 1000000, "attention_config": [[["flash"], 80]], "num_kv_heads": 8}
PUBLISHED: dict[str, tuple[dict[str, Any], int, float | None]] = {
    # name -> (file, width of the gate, parameters in billions with a vocabulary of 32,000, by the papers)
    "llama/7B": (shape(32, 4096, 32, 32768, **FIRST), 11008, 6.738),
    "llama/13B": (shape(40, 5120, 40, 40960, **FIRST), 13824, 13.016),
    "llama/30B": (shape(60, 6656, 52, 53248, **FIRST), 17920, 32.529),
    "llama/65B": (shape(80, 8192, 64, 65536, **FIRST), 22016, 65.286),
    # these leave use_bias_in_mlp at its default, true
    "llama2/7B": (shape(32, 4096, 32, 32768, 4096), 11008, None),
    "llama2/13B": (shape(40, 5120, 40, 41472, 4096), 13824, None),
    "llama2/70B": (shape(80, 8192, 64, 86016, 4096, **FLASH), 28672, None),
    "llama2/codellama_7B": (shape(32, 4096, 32, None, 16384, rotary_emb_base=1000000), 5632, None),
}
RUN = {key: SMALL[key] for key in ("train_iters", "train_micro_batch_size_per_gpu", "optimizer", "data_path")}
RUN |= {"padded_vocab_size": 32000}


def model_of(place: Path, values: dict[str, Any]) -> tuple[ModelConfig, Any]:
    file = place / "f.yml"
    file.write_text(yaml.safe_dump(values))
    run, account = load_neox([file], [], 1)
    assert run.model is not None
    return run.model, account


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_read_without_edits(name: str, tmp_path: Path) -> None:
    file, width, billions = PUBLISHED[name]
    model, account = model_of(tmp_path, RUN | file)
    assert (model.family, model.ffn_size, model.norm, model.activation) == ("llama", width, "rms", "swiglu")
    assert (model.rotary_fraction, model.residual, model.attention_bias) == (1.0, "sequential", False)
    assert (model.num_kv_heads, model.rotary_base) == (file.get("num_kv_heads"), file.get("rotary_emb_base", 10000))
    assert model.layernorm_eps == file["rms_norm_epsilon"]
    assert model.mlp_bias == (not name.startswith("llama/"))
    assert any("use_bias_in_mlp is not given" in note for note in account.notes) == model.mlp_bias
    assert "bias_gelu_fusion" in account.not_applicable and "rms_norm_epsilon" in account.honoured
    if billions is not None:
        assert round(count_parameters(model) / 1e9, 3) == billions


OLD = {"mlp_type": "llama", "activation": "silu"}


def test_files_of_versions_up_to_2024(tmp_path: Path) -> None:
    """Llama 7B without a width, and Mistral 7B with its own; that MLP had no biases."""
    plain = {key: value for key, value in shape(32, 4096, 32, None).items() if key != "mlp_multiple_of"} | OLD
    model, _ = model_of(tmp_path, RUN | plain)
    assert (model.family, model.ffn_size, model.mlp_bias) == ("llama", 11008, False)
    more = {"num_kv_heads": 8, "sliding_window_width": 4096, "attention_config": [[["flash"], 32]]}
    model, _ = model_of(tmp_path, RUN | plain | more | {"intermediate_size": 14336})
    assert (model.family, model.ffn_size, model.sliding_window, model.num_kv_heads) == ("mistral", 14336, 4097, 8)


def test_convert_config_writes_the_family(tmp_path: Path) -> None:
    (tmp_path / "f.yml").write_text(json.dumps(RUN | PUBLISHED["llama2/70B"][0]))
    tool("convert_config", tmp_path / "f.yml", "--output", tmp_path / "run.yml")
    model = yaml.safe_load((tmp_path / "run.yml").read_text())["model"]
    assert (model["family"], model["num_kv_heads"], model["ffn_size"]) == ("llama", 8, 28672)


TINY = SMALL | {key: COMMON[key] for key in ("norm", "activation", "rotary_pct")} | {"intermediate_size": 96}
BARE = TINY | {"use_bias_in_attn_linear": False, "use_bias_in_mlp": False}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (TINY | {"activation": "gelu"}, r"activation: 'gelu' can't be honoured: only a SwiGLU goes with RMSNorm"),
        (TINY | {"activation": "geglu"}, r"activation: 'geglu' can't be honoured"),
        ({key: value for key, value in TINY.items() if key != "activation"}, r"norm: 'rmsnorm' can't be honoured"),
        (SMALL | {"activation": "swiglu"}, r"activation: 'swiglu' can't be honoured: only GELU goes with LayerNorm"),
        (SMALL | {"norm": "scalenorm"}, r"norm: 'scalenorm' can't be honoured"),
        (SMALL | {"mlp_type": "llama"}, r"mlp_type: 'llama' can't be honoured"),
        (TINY | {"mlp_type": "llama"}, r"activation: 'swiglu' can't be honoured"),
        (TINY | {"mlp_type": "gated"}, r"mlp_type: 'gated' can't be honoured"),
        (TINY | {"rotary_pct": 0.25}, r"rotary_pct: 0\.25 can't be honoured: with RMSNorm every channel"),
        (TINY | {"gpt_j_residual": True}, r"gpt_j_residual: True can't be honoured"),
        (TINY | {"sliding_window_width": 4}, r"sliding_window_width: 4 can't be honoured: a window goes with no biases"),
        (
            BARE | {"sliding_window_width": 4, "scaled_upper_triang_masked_softmax_fusion": True},
            r"sliding_window_width: 4 can't be honoured: GPT-NeoX's fused softmax .* takes no window",
        ),
        (TINY | {"num_kv_heads": 3}, r"num_heads 4 is not divisible by num_kv_heads 3"),
        (TINY | {"use_qk_layernorm": True}, r"use_qk_layernorm: True can't be honoured"),
        (SMALL | {"num_kv_heads": 2}, r"num_kv_heads: 2 can't be honoured: with LayerNorm every head"),
        (SMALL | {"use_bias_in_mlp": False}, r"use_bias_in_mlp: False can't be honoured: with LayerNorm"),
        (TINY | {"intermediate_size": 14336}, r"intermediate_size: GPT-NeoX can't build .* give intermediate_size: 43008"),
        (TINY | {"sliding_window_width": "all"}, r"sliding_window_width: 'all' "),
    ],
)
def test_what_is_in_no_family_is_refused_by_key_and_line(values: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says) as caught:
        model_of(tmp_path, values)
    assert "\n" not in str(caught.value) and str(tmp_path / "f.yml") in str(caught.value)


def test_a_window_with_flash_attention_or_the_plain_softmax(tmp_path: Path) -> None:
    for more in ({"attention_config": [[["flash"], 2]], "scaled_upper_triang_masked_softmax_fusion": True}, {}):
        model, _ = model_of(tmp_path, BARE | {"sliding_window_width": 4} | more)
        assert (model.family, model.sliding_window) == ("mistral", 5)


@given(st.integers(1, 5000), st.integers(1, 300))
def test_the_width_is_that_of_both_of_their_matrices(wanted: int, multiple: int) -> None:
    """Both layers are built from rounded sizes; what the first gives in two halves, the second takes."""
    asked = {"hidden_size": 64, "intermediate_size": wanted, "mlp_multiple_of": multiple}
    both = wanted * 2 // 3
    first = next(n for n in range(0, 20000, 2 * multiple) if n >= both)
    second = next(n for n in range(0, 20000, multiple) if n >= both // 2)
    assert gated_width(asked) == (second if first == 2 * second and second else None)
    assert gated_width(asked | {"intermediate_size": 3 * wanted, "mlp_multiple_of": 1}) == wanted
