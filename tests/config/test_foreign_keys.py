"""Configurations of foreign checkpoints that name another function: refused by name, and harmless keys of any version read."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megarewarm.checkpoint.foreign import huggingface
from megarewarm.checkpoint.foreign.huggingface_keys import KEYS as HUGGINGFACE_KEYS
from megarewarm.checkpoint.foreign.megatron_keys import KEYS as MEGATRON_KEYS
from megarewarm.checkpoint.foreign.neox_folder import NeoXFolder
from megarewarm.checkpoint.foreign.recorded_keys import is_off, refuse_other_functions
from megarewarm.checkpoint.source import open_checkpoint
from megarewarm.config.neox_function import another_function
from megarewarm.errors import UserError
from megarewarm.model.transformer import Transformer
from tests.support import megatron_writer, neox_writer
from tests.support.huggingface import load_weights

# ---- Megatron-LM ---------------------------------------------------------------------------------------------------

OTHER = {
    "rotary_seq_len_interpolation_factor": 4,
    "use_rope_scaling": True,
    "rotary_interleaved": True,
    "no_rope_freq": 4,
    "window_size": (127, 0),
    "softmax_scale": 0.25,
    "softmax_type": "off-by-one",
    "apply_residual_connection_post_layernorm": True,
    "apply_layernorm_1p": True,
    "layernorm_zero_centered_gamma": True,
    "qk_l2_norm": True,
    "qk_layernorm": True,
    "kv_channels": 8,
    "num_experts": 2,
    "mtp_num_layers": 1,
    "multi_latent_attention": True,
    "activation_func_clamp_value": 7.0,
    "use_mup": True,
    "spec": ["my.module", "layer"],
    "heterogeneous_layers_config_path": "blocks.json",
    "experimental_attention_variant": "dsa",
    "position_embedding_type": "none",
    "squared_relu": True,
    "num_layers": 5,
    "padded_vocab_size": 64,
    "tensor_model_parallel_size": 2,
    "lora_rank": 8,  # of nobody's list
    "scale_of_a_later_version": 2.0,
}


@pytest.mark.parametrize("key", OTHER)
def test_arguments_of_megatron_that_are_another_function_are_refused(tmp_path: Path, key: str) -> None:
    megatron_writer.write(tmp_path, megatron_writer.Shape(args={key: OTHER[key]}), megatron_writer.whole_model(3))
    with pytest.raises(UserError, match=rf"iter_0000005.*{key} is "):
        open_checkpoint(str(tmp_path))


def test_harmless_arguments_of_megatron_are_read(tmp_path: Path) -> None:
    harmless = {
        "lr": 3e-4,
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "fp8": None,
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "apply_query_key_layer_scaling": True,
        "attention_softmax_in_fp32": True,
        "transformer_impl": "transformer_engine",
        "moe_router_topk": 2,
        "kv_channels": 4,
        "softmax_scale": 0.5,
        "num_query_groups": 1,
        "rope_type": "rope",
        "no_rope_freq": [0, 0, 0, 0],
        "a_feature_of_a_later_version": False,
        "another_one": None,
        "save_interval": 500,
        "hidden_dropout": 0.1,
    }
    megatron_writer.write(tmp_path, megatron_writer.Shape(args=harmless), megatron_writer.whole_model(3))
    assert any("hidden_dropout 0.1 is not used" in note for note in open_checkpoint(str(tmp_path)).notes)


def test_every_default_of_megatron_core_is_read() -> None:
    """All fields of its configuration of a transformer: none is refused at the value that plain models have."""
    transformer_config = pytest.importorskip("megatron.core.transformer.transformer_config")
    for field in fields(transformer_config.TransformerConfig):
        refuse_other_functions(
            "x", {field.name: field.default if isinstance(field.default, int | float | str) else None}, MEGATRON_KEYS
        )


def test_the_ranks_of_a_megatron_checkpoint_are_of_one_model(tmp_path: Path) -> None:
    folder = megatron_writer.write(tmp_path, megatron_writer.Shape(tensor=2), megatron_writer.whole_model(3))
    file = folder / "mp_rank_01" / "model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    content["args"].rotary_percent = 0.25
    torch.save(content, file)
    with pytest.raises(UserError, match=r"mp_rank_01.*rotary_percent is 0\.5 by the file of rank 0 and 0\.25 by this one"):
        open_checkpoint(str(tmp_path))


# ---- GPT-NeoX ------------------------------------------------------------------------------------------------------


def _neox(place: Path, **settings: Any) -> Path:
    weights = neox_writer.whole_model(1)
    shape = neox_writer.Shape(era="none", dtype=torch.float32)
    folder = neox_writer.write(place, shape, weights, weights, (weights, weights))
    if settings:
        (folder / "configs" / "more.yml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gpt_j_tied", True),
        ("num_kv_heads", 2),
        ("sliding_window_width", 128),
        ("use_qk_layernorm", True),
        ("use_mup", True),
        ("moe_num_experts", 8),
        ("activation", "swiglu"),
        ("norm", "rmsnorm"),
        ("soft_prompt_tuning", {"enabled": True, "num_tokens": 10}),
        ("attention_config", [[["global", "local"], 1]]),
        ("attention_config", [[["mamba"], "all"]]),
        ("use_bias_in_mlp", False),
        ("geglu", True),
        ("a-scale-of-a-later-version", 2.0),
        ("rotary_pct", 0.5),
        ("num_attention_heads", 8),
        ("padded_vocab_size", 64),
        ("model_parallel_size", 2),
    ],
)
def test_keys_of_gpt_neox_that_are_another_function_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"{key.replace('-', '_')} is |rotary_pct is 0\.5, and 0\.25"):
        NeoXFolder(_neox(tmp_path, **{key: value}))


def test_keys_of_training_are_harmless_beside_weights(tmp_path: Path) -> None:
    training = {
        "hidden-dropout": 0.1,
        "train_impl": "dpo",
        "dpo_beta": 0.1,
        "lr": 1e-3,
        "z_loss": 1e-4,
        "gas": 2,
        "new_key": False,
    }
    sequential = {"num_kv_heads": 4, "launcher": "slurm", "attention_config": [[["global", "flash"], "all"]]}
    NeoXFolder(_neox(tmp_path, **training, **sequential))


def test_every_default_of_gpt_neox_is_harmless() -> None:
    """All keys of its arguments, but for the positions, whose default no model here has."""
    recorded = Path(os.environ.get("MEGAREWARM_TEST_DATA", "")) / "neox_real" / "neox_fields.json"
    if not recorded.is_file():
        pytest.skip("MEGAREWARM_TEST_DATA has no neox_real/neox_fields.json")
    defaults = json.loads(recorded.read_text())
    assert len(defaults) == 318 and set(another_function(defaults)) == {"pos_emb"}


def test_settings_without_the_keys_of_the_model_are_refused(tmp_path: Path) -> None:
    folder = _neox(tmp_path)
    (folder / "configs" / "model.yml").write_text(yaml.safe_dump({"data_path": "there", "num_attention_heads": 4}))
    with pytest.raises(UserError, match="'pos_emb' is missing, so the keys of the model are in another file"):
        NeoXFolder(folder)


def test_the_ranks_of_a_gpt_neox_checkpoint_are_of_one_step(tmp_path: Path) -> None:
    weights = neox_writer.whole_model(1)
    shape = neox_writer.Shape(era="none", dtype=torch.float32, tensor=2)
    folder = neox_writer.write(tmp_path, shape, weights, weights, (weights, weights))
    content = torch.load(folder / "mp_rank_01_model_states.pt", weights_only=True)
    torch.save(content | {"iteration": 8}, folder / "mp_rank_01_model_states.pt")
    with pytest.raises(UserError, match=r"mp_rank_01.*iteration is 7 by the file of the first rank and 8 by this one"):
        NeoXFolder(folder)


# ---- folders of DeepSpeed that are not GPT-NeoX's, or of another stage ----------------------------------------------


def test_folders_of_zero_3_and_of_the_trainer_are_refused_in_one_line(tmp_path: Path) -> None:
    folder = _neox(tmp_path / "zero3")
    for file in folder.glob("*.pt"):
        file.unlink()
    torch.save({}, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    for name in (folder, folder.parent):
        with pytest.raises(UserError, match=r"written with ZeRO stage 3.*zero_to_fp32"):
            open_checkpoint(str(name))
    trainer = tmp_path / "checkpoint-5" / "global_step5"
    trainer.mkdir(parents=True)
    (trainer.parent / "latest").write_text("global_step5")
    module = {"gpt_neox.embed_in.weight": torch.zeros(4, 4), "gpt_neox.layers.0.input_layernorm.weight": torch.zeros(4)}
    torch.save({"module": module}, trainer / "mp_rank_00_model_states.pt")
    for name in (trainer, trainer.parent):
        with pytest.raises(UserError, match=r"is no name of GPT-NeoX's.*give the folder above, with config\.json"):
            open_checkpoint(str(name))


# ---- Hugging Face --------------------------------------------------------------------------------------------------


def _saved(place: Path, changes: dict[str, Any]) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.GPTNeoXConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, initializer_range=0.3
    )
    transformers.GPTNeoXForCausalLM(config).save_pretrained(place)
    raw = {**json.loads((place / "config.json").read_text()), **changes}
    (place / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value != "LEFT OUT"}))
    return place


CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "sequential": {"use_parallel_residual": False},
    "tanh": {"hidden_act": "gelu_new"},
    "epsilon": {"layer_norm_eps": 0.1},
    "base": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5}},
    "keys of version 4": {"rope_parameters": "LEFT OUT", "rotary_emb_base": 50, "rotary_pct": 0.5},
    "both, unlike": {"rotary_pct": 0.5},
    "another name": {"rope_parameters": "LEFT OUT", "rope_theta": 50.0},
    "another name of the share": {"rope_parameters": "LEFT OUT", "partial_rotary_factor": 0.5},
    "scaling": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "scaling of another base": {"rope_scaling": {"rope_type": "default", "rope_theta": 50.0}},
    "not causal": {"is_causal": False},
    "dropout": {"hidden_dropout": 0.1, "attention_dropout": 0.1, "classifier_dropout": 0.3},
    "generation": {
        "temperature": 0.3,
        "max_length": 50,
        "num_beams": 3,
        "_name_or_path": "x/y",
        "gradient_checkpointing": True,
    },
    "pruned": {"pruned_heads": {"0": [1]}},
    "window": {"sliding_window": 4},
    "quantized": {"quantization_config": {"load_in_4bit": True}},
    "code": {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}},
    "unknown": {"logits_soft_cap": 30.0},
    "unknown, off": {"logits_soft_cap": None},
    "other heads": {"head_dim": 4},
}
REFUSED = {
    "both, unlike",
    "another name",
    "another name of the share",
    "scaling",
    "scaling of another base",
    "not causal",
    "pruned",
}
REFUSED |= {"window", "quantized", "code", "unknown", "other heads"}


@pytest.mark.parametrize("name", CHANGES)
def test_a_config_is_read_as_transformers_does_or_refused(tmp_path: Path, name: str) -> None:
    folder = _saved(tmp_path, CHANGES[name])
    if name in REFUSED:
        with pytest.raises(UserError, match=r"config\.json"):
            open_checkpoint(str(folder))
        return
    transformers = pytest.importorskip("transformers")
    config, _ = huggingface.read_model_config(folder)
    model = Transformer(config).eval()
    load_weights(folder, model)
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        theirs = transformers.GPTNeoXForCausalLM.from_pretrained(folder).eval()(tokens).logits
        assert torch.allclose(model.logits(tokens), theirs, atol=1e-4)


def test_every_default_of_transformers_is_read() -> None:
    transformers = pytest.importorskip("transformers")
    given = transformers.GPTNeoXConfig().to_dict()
    refuse_other_functions("x", given, HUGGINGFACE_KEYS)
    known = HUGGINGFACE_KEYS
    assert [k for k in given if k not in known.read and k not in known.only and not known.harmless.fullmatch(k)] == []


def test_the_weights_are_those_that_transformers_takes(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = _saved(tmp_path, {})
    whole = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in whole.items()}, folder / "other.safetensors")
    index = {"weight_map": dict.fromkeys(whole, "other.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    stored = huggingface.HuggingFaceWeights(folder)
    assert torch.equal(stored.read("embed_in.weight"), whole["gpt_neox.embed_in.weight"])
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"adapter_config\.json: transformers adds the adapter"):
        huggingface.HuggingFaceWeights(folder)


def test_what_is_off() -> None:
    off: list[Any] = [None, False, 0, 0.0, "", [], (0, 0), {}, {"a": None}]
    assert all(is_off(value) for value in off)
    assert not any(is_off(value) for value in (True, 1, "no", [0, 1], {"a": 2}, torch.float32))
