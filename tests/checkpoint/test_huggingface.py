"""Hugging Face folders: what transformers writes we read, what we write transformers reads, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXForCausalLM

from megarewarm.checkpoint.export.huggingface import ModelWeights, export
from megarewarm.checkpoint.foreign.hub import resolve
from megarewarm.checkpoint.foreign.huggingface import read_model_config
from megarewarm.config.model import ModelConfig
from megarewarm.errors import UserError
from megarewarm.model.initialize import initialize
from megarewarm.model.transformer import Transformer
from tests.model.test_neox import SHAPE, VARIANTS, some_tokens, their_parameters, transformers_model
from tests.support.huggingface import load_weights


def theirs(changes: dict[str, Any], dtype: torch.dtype = torch.float32) -> GPTNeoXForCausalLM:
    torch.manual_seed(2)
    model = transformers_model(ModelConfig(**(SHAPE | changes)), dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def loaded(folder: Path) -> Transformer:
    config, _ = read_model_config(folder)
    model = Transformer(config)
    load_weights(folder, model)
    return model


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_folder_of_transformers_gives_its_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = theirs(changes)
    model.save_pretrained(tmp_path)
    ours = loaded(tmp_path)
    wanted = ModelConfig(**(SHAPE | changes))
    assert ours.config == wanted.model_copy(update={"ffn_size": wanted.mlp_size})
    tokens = some_tokens(ours.config)
    torch.testing.assert_close(ours.logits(tokens), model(tokens).logits, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_weights_are_read_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    model = theirs({}, dtype)
    model.save_pretrained(tmp_path)
    for name, parameter in loaded(tmp_path).named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, their_parameters(model)[name].float())


def test_sharded_folders_and_bin_files_are_the_same_model(tmp_path: Path) -> None:
    model = theirs({})
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_bytes((tmp_path / "one" / "config.json").read_bytes())
    torch.save(load_file(tmp_path / "one" / "model.safetensors"), tmp_path / "bin" / "pytorch_model.bin")
    one = loaded(tmp_path / "one").state_dict()
    for other in ("many", "bin"):
        assert all(torch.equal(value, one[name]) for name, value in loaded(tmp_path / other).state_dict().items())


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_what_we_export_transformers_loads(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = ModelConfig(**(SHAPE | changes))
    model = Transformer(config, padded_vocab_size=64)
    initialize(model, 3)
    export(ModelWeights(model), config, tmp_path / "out")
    tokens = some_tokens(config)
    peer_of: Any = GPTNeoXForCausalLM.from_pretrained
    peer, report = peer_of(tmp_path / "out", attn_implementation="eager", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert peer.config.vocab_size == 61
    torch.testing.assert_close(peer(tokens).logits, model.logits(tokens), rtol=2e-5, atol=2e-5)
    back = loaded(tmp_path / "out")
    for name, parameter in back.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name][: len(parameter)]), name


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_the_configuration_that_we_write_is_read_without_a_warning(
    tmp_path: Path, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoConfig
    from transformers.utils import logging

    config = ModelConfig(**(SHAPE | changes | {"layernorm_eps": 1e-12, "rotary_base": 5e5}))
    export(ModelWeights(Transformer(config)), config, tmp_path / "out")
    logging.enable_propagation()
    try:
        read = AutoConfig.from_pretrained(tmp_path / "out")
    finally:
        logging.disable_propagation()
    assert not [record.message for record in caplog.records if record.name.startswith("transformers")]
    assert (read.layer_norm_eps, read.rope_parameters["rope_theta"]) == (1e-12, 5e5)
    assert read.rope_parameters["partial_rotary_factor"] == config.rotary_fraction
    assert read_model_config(tmp_path / "out")[0] == config.model_copy(
        update={"init": "small", "output_init": "wang", "ffn_size": config.mlp_size}
    )


def test_a_large_export_goes_to_several_files(tmp_path: Path) -> None:
    config = ModelConfig(**SHAPE)
    model = Transformer(config)
    initialize(model, 3)
    export(ModelWeights(model), config, tmp_path / "out", shard_bytes=100_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert all((tmp_path / "out" / name).stat().st_size < 120_000 for name in index["weight_map"].values())
    peer = GPTNeoXForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(their_parameters(peer)[name], value) for name, value in model.named_parameters())


def test_old_buffers_are_ignored(tmp_path: Path) -> None:
    theirs({}).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors |= {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 32, 32, dtype=torch.uint8),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    loaded(tmp_path)


def test_the_choice_of_gelu_is_stated(tmp_path: Path) -> None:
    theirs({"activation": "gelu_erf"}).save_pretrained(tmp_path)
    _, notes = read_model_config(tmp_path)
    assert any("gelu_tanh" in note and "exact GELU" in note for note in notes)


def broken(folder: Path, how: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if how == "missing":
        del tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    elif how == "extra":
        tensors["gpt_neox.layers.9.mlp.dense_h_to_4h.weight"] = torch.ones(2, 2)
    elif how == "shape":
        tensors["gpt_neox.final_layer_norm.bias"] = torch.ones(63)
    elif how == "dtype":
        tensors["gpt_neox.final_layer_norm.bias"] = torch.ones(64, dtype=torch.int32)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "none":
        path.unlink()
    elif how == "json":
        (folder / "config.json").write_text("{")
    elif how in ("type", "rope", "activation"):
        config = json.loads((folder / "config.json").read_text())
        changes: dict[str, dict[str, Any]] = {
            "type": {"model_type": "gemma2"},
            "rope": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}},
            "activation": {"hidden_act": "relu"},
        }
        (folder / "config.json").write_text(json.dumps(config | changes[how]))
    else:
        save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"missing tensor gpt_neox\.layers\.1\.mlp\.dense_h_to_4h\.weight"),
        ("extra", r"unexpected tensor gpt_neox\.layers\.9\.mlp\.dense_h_to_4h\.weight in model\.safetensors"),
        ("shape", r"final_layer_norm\.bias in model\.safetensors has shape \(63,\), expected \(64,\)"),
        ("dtype", r"final_layer_norm\.bias .*has dtype"),
        ("truncated", r"model\.safetensors: not a readable safetensors file"),
        ("none", "no weights found"),
        ("json", r"config\.json"),
        ("type", "model_type is 'gemma2'.*nearest one that works is 'llama'"),
        ("rope", "rope_type is 'dynamic'"),
        ("activation", "hidden_act is 'relu'"),
    ],
)
def test_a_damaged_folder_is_named(tmp_path: Path, how: str, message: str) -> None:
    theirs({}).save_pretrained(tmp_path)
    broken(tmp_path, how)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=message):
        loaded(tmp_path)
    assert snapshot(tmp_path) == before


def test_an_untied_head_under_a_tied_config_is_refused(tmp_path: Path) -> None:
    theirs({}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(UserError, match="the head is not the embedding"):
        loaded(tmp_path)


def test_exports_replace_exports_only(tmp_path: Path) -> None:
    config = ModelConfig(**SHAPE)
    model = Transformer(config)
    initialize(model, 3)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not an export of megarewarm"):
        export(ModelWeights(model), config, tmp_path / "precious")
    assert snapshot(tmp_path) == {"precious/thesis.txt": b"years of work"}
    export(ModelWeights(model), config, tmp_path / "out")
    first = snapshot(tmp_path / "out")
    initialize(model, 4)
    export(ModelWeights(model), config, tmp_path / "out")
    assert snapshot(tmp_path / "out") != first
    with pytest.raises(UserError, match="no such tokenizer"):
        export(ModelWeights(model), config, tmp_path / "other", tokenizer=tmp_path / "no.json")
    assert not (tmp_path / "other").exists()


def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="no such folder, and not a hub name"):
        resolve(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="neither a folder, nor in the Hugging Face cache, nor to be downloaded"):
        resolve("megarewarm-tests/does-not-exist@main")
