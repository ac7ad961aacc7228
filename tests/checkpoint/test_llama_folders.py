"""Hugging Face folders of Llama-like models in all the forms that are found: read bit for bit, written so that transformers
loads them strictly and without a word, with the same logits and the same keys in config.json."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as their_logging

from megarewarm.checkpoint.convert import ConvertOptions, convert
from megarewarm.checkpoint.export.huggingface import ModelWeights, export
from megarewarm.checkpoint.foreign.huggingface import read_model_config
from megarewarm.checkpoint.foreign.huggingface_llama import LLAMA_LIKE
from megarewarm.checkpoint.inspection import differences
from megarewarm.checkpoint.source import open_checkpoint
from megarewarm.errors import UserError
from megarewarm.model.transformer import Transformer
from tests.support.families import CONFIGS, USUAL, VOCABULARY, saved

TOKENS = torch.randint(0, VOCABULARY, (2, 23), generator=torch.Generator().manual_seed(5))
TIED = ("llama, tied, 6:1, yarn", "qwen2", "smollm3")


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def change(folder: Path, **keys: Any) -> dict[str, Any]:
    """config.json with other ``keys``; None takes one out."""
    raw = {key: value for key, value in (config_of(folder) | keys).items() if value is not None or key not in keys}
    (folder / "config.json").write_text(json.dumps(raw))
    return raw


def as_version_4(folder: Path) -> None:
    """As transformers 4.51 wrote config.json: rotary positions at its top, and torch_dtype."""
    raw = config_of(folder)
    rope = raw.pop("rope_parameters")
    kind = rope.pop("rope_type")
    raw |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": None if kind == "default" else {"type": kind, **rope}}
    raw |= {"torch_dtype": raw.pop("dtype"), "transformers_version": "4.51.0"}
    raw.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(raw))


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@contextmanager
def without_a_word(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Neither a warning of Python's, nor a line of transformers' log."""
    caplog.clear()
    their_logging.enable_propagation()
    try:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            yield
    finally:
        their_logging.disable_propagation()
    assert [record.getMessage() for record in caplog.records if record.name.startswith("transformers")] == []


def strictly(folder: Path, caplog: pytest.LogCaptureFixture) -> PreTrainedModel:
    """transformers' model of ``folder``, of which no tensor is missing, left over or of another shape."""
    load: Any = AutoModelForCausalLM.from_pretrained
    with without_a_word(caplog):
        model, report = load(folder, output_loading_info=True, attn_implementation="eager", dtype="auto")
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), report
    found: PreTrainedModel = model.eval()
    return found


def to(form: str, source: Path | str, destination: Path, **options: Any) -> Path:
    convert(open_checkpoint(str(source)), destination, ConvertOptions(form, **options))
    return destination


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


# ---- there and back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_bit_for_bit(name: str, version: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = saved(name, tmp_path / "start")
    if version == 4:
        as_version_4(tmp_path / "start")
    # the same function as this version of transformers reads from the file
    assert torch.equal(strictly(tmp_path / "start", caplog)(TOKENS).logits, model(TOKENS).logits)
    to("megarewarm", tmp_path / "start", tmp_path / "own")
    back = to("hf", tmp_path / "own", tmp_path / "back")
    assert_same(tensors_in(back), tensors_in(tmp_path / "start"))
    assert torch.equal(strictly(back, caplog)(TOKENS).logits, model(TOKENS).logits)
    before, after = config_of(tmp_path / "start"), config_of(back)
    assert {key: after[key] for key in before} == before
    assert after["model_type"] == name.split(",")[0] == before["model_type"]
    direct = to("hf", tmp_path / "start", tmp_path / "direct")
    assert_same(tensors_in(direct), tensors_in(back))


FORMS: dict[str, Callable[[Path], None]] = {}


def form(make: Callable[[Path], None]) -> Callable[[Path], None]:
    FORMS[make.__name__] = make
    return make


@form
def sharded(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / FILE).unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 2 and (folder / "model.safetensors.index.json").exists()


@form
def bin_file(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@form
def old_buffers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(3) for i in range(3)}, folder / FILE)


@form
def head_stored_though_tied(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()} | tensors, folder / FILE)


@form
def no_prefix(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, folder / FILE)


FILE = "model.safetensors"


_TIED = "head_stored_though_tied"


@pytest.mark.parametrize(
    ("name", "how"), [(n, how) for n in USUAL for how in FORMS if how != _TIED or CONFIGS[n].tie_word_embeddings]
)
def test_every_form_is_the_same_model(name: str, how: str, tmp_path: Path) -> None:
    saved(name, tmp_path / "start")
    saved(name, tmp_path / how)
    FORMS[how](tmp_path / how)
    one, other = (open_checkpoint(str(tmp_path / folder)).weights for folder in ("start", how))
    head = {"embed_out.weight"} if how == "head_stored_though_tied" else set()
    assert set(other.describe()) == set(one.describe()) | head
    for key in one.describe():
        assert torch.equal(one.read(key), other.read(key)), key
    changes = list(differences(open_checkpoint(str(tmp_path / "start")), open_checkpoint(str(tmp_path / how))))
    assert changes and not any(each.changed for each in changes)
    written = to("hf", tmp_path / how, tmp_path / "out")
    assert_same(tensors_in(written), tensors_in(to("hf", tmp_path / "start", tmp_path / "plain")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", USUAL)
def test_half_precision(name: str, dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model: Any = saved(name, tmp_path / "fp32")
    model.to(dtype).save_pretrained(tmp_path / "start")
    first = tensors_in(tmp_path / "start")
    assert_same(tensors_in(to("hf", tmp_path / "start", tmp_path / "same")), first)
    assert config_of(tmp_path / "same")["torch_dtype"] == str(dtype).removeprefix("torch.")
    own = to("megarewarm", tmp_path / "start", tmp_path / "own")
    assert_same(tensors_in(to("hf", own, tmp_path / "again", dtype=dtype)), first)
    assert strictly(tmp_path / "again", caplog).dtype == dtype
    full = tensors_in(to("hf", own, tmp_path / "full"))
    assert all(full[key].dtype == torch.float32 and torch.equal(full[key], first[key].float()) for key in first)


def test_names_of_the_hub_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cache = tmp_path / "models--meta--Tiny-1B"
    saved("llama", cache / "snapshots" / "abc", max_shard_size="10KB")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    found = open_checkpoint("meta/Tiny-1B")
    assert found.name == "meta/Tiny-1B" and found.model_config.family == "llama"
    assert found.lineage.stages[0].card is not None and found.lineage.stages[0].card.base_model == "meta/Tiny-1B"
    next((cache / "snapshots" / "abc").glob("model-00002*")).unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"meta/Tiny-1B: its local copy .* lacks model-00002-of-\d+\.safetensors: run"):
        open_checkpoint("meta/Tiny-1B")


# ---- config.json ---------------------------------------------------------------------------------------------------

HARMLESS = {
    "_name_or_path": "somewhere/else",
    "pretraining_tp": 2,
    "eos_token_id": [2, 7, 8],
    "is_llama_config": True,
    "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"fp16": "float16"}},
    "rope_interleaved": False,
    "max_sequence_length": 2048,
    "unsloth_fixed": True,
    "use_cache": False,
    "a_feature_of_a_later_version": None,
    "attention_dropout": 0.1,
    "initializer_range": 0.03,
    "id2label": {"0": "LABEL_0"},
}


@pytest.mark.parametrize("name", USUAL)
def test_keys_that_training_does_not_change_are_kept(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(name, tmp_path / "start")
    before = change(tmp_path / "start", **HARMLESS) | {"a_feature_of_a_later_version": None}
    source = open_checkpoint(str(tmp_path / "start"))
    assert source.notes == ["attention_dropout 0.1 is not used: megarewarm trains without dropout"]
    own = to("megarewarm", tmp_path / "start", tmp_path / "own")
    after = config_of(to("hf", own, tmp_path / "out"))
    assert {key: after.get(key) for key in before} == before
    start, out = (json.loads((tmp_path / folder / "generation_config.json").read_text()) for folder in ("start", "out"))
    assert start == out
    strictly(tmp_path / "out", caplog)


def test_how_to_sample_is_kept(tmp_path: Path) -> None:
    """generation_config.json comes back as it was, through a checkpoint of ours and straight."""
    saved("llama", tmp_path / "start")
    given = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 7], "transformers_version": "4.45.0"}
    (tmp_path / "start/generation_config.json").write_text(json.dumps(given))
    for start in (tmp_path / "start", to("megarewarm", tmp_path / "start", tmp_path / "own")):
        out = to("hf", start, tmp_path / f"out of {start.name}")
        assert json.loads((out / "generation_config.json").read_text()) == given
    generation = AutoModelForCausalLM.from_pretrained(out).generation_config
    assert generation.do_sample and generation.temperature == 0.6 and generation.eos_token_id == [2, 7]


def test_a_damaged_generation_config_is_named(tmp_path: Path) -> None:
    saved("llama", tmp_path / "start")
    (tmp_path / "start/generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json: not readable as JSON"):
        open_checkpoint(str(tmp_path / "start"))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rows", [67, 50])
def test_another_vocabulary(name: str, rows: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(name, tmp_path / "start")
    out = to("hf", tmp_path / "start", tmp_path / "out", vocab_size=rows)
    assert config_of(out)["vocab_size"] == rows
    model = strictly(out, caplog)
    same, first = min(rows, VOCABULARY), tensors_in(tmp_path / "start")["model.embed_tokens.weight"]
    embedding: Any = model.get_input_embeddings()
    assert embedding.weight.shape[0] == rows and torch.equal(embedding.weight[:same], first[:same])


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"rotary_base": 5e4}),
        ("llama", {"rotary_scaling": None}),
        ("llama, tied, 6:1, yarn", {"rotary_scaling": {"kind": "linear", "factor": 2.0}}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 3}),
        ("qwen2, windows", {"sliding_window": None, "window_layers": None}),
        ("qwen2, windows", {"window_layers": (0,)}),
        ("qwen3", {"sliding_window": 4, "window_layers": (1, 2)}),
        ("smollm3", {"unrotated_layers": (0, 2), "sliding_window": None, "window_layers": None}),
        ("olmo2", {"layernorm_eps": 1e-3, "max_positions": 128}),
    ],
)
def test_what_a_user_changes_is_written(
    name: str, changes: dict[str, Any], version: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(name, tmp_path / "start")
    if version == 4:
        as_version_4(tmp_path / "start")
    if "scaling" in str(changes):
        original = CONFIGS[name].rope_parameters["original_max_position_embeddings"]
        change(tmp_path / "start", original_max_position_embeddings=original)
    source = open_checkpoint(str(tmp_path / "start"))
    config = type(source.model_config)(**(source.model_config.model_dump() | changes))
    model = Transformer(config)
    model.load_state_dict({key: source.weights.read(key) for key in source.weights.describe()})
    export(ModelWeights(model), config, tmp_path / "out", lineage=source.lineage)
    assert open_checkpoint(str(tmp_path / "out")).model_config == config
    wanted = strictly(tmp_path / "out", caplog)(TOKENS).logits
    torch.testing.assert_close(model.logits(TOKENS), wanted, rtol=0, atol=2e-6 * float(wanted.detach().abs().max()))


@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_a_config_without_keys_means_what_transformers_takes(name: str, tmp_path: Path) -> None:
    """The smallest config.json, against the configuration class (GPT-NeoX's: tests/config/test_foreign_keys.py)."""
    shape = {"num_hidden_layers": 8, "hidden_size": 256, "num_attention_heads": 32, "intermediate_size": 64, "vocab_size": 40}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name, **shape}))
    ours, notes = read_model_config(tmp_path)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert notes == []
    assert ours.kv_heads == theirs.num_key_value_heads and ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.head_width == (getattr(theirs, "head_dim", None) or 8)
    assert ours.max_positions == theirs.max_position_embeddings and ours.layernorm_eps == theirs.rms_norm_eps
    assert ours.rotary_base == theirs.rope_parameters["rope_theta"] and ours.rotary_scaling is None
    assert ours.init_std == theirs.initializer_range
    assert ours.attention_bias == getattr(theirs, "attention_bias", name == "qwen2")
    assert ours.mlp_bias == getattr(theirs, "mlp_bias", False)
    window = theirs.sliding_window if name == "mistral" else None
    assert [ours.window_of(i) for i in range(8)] == [window] * 8
    assert list(ours.unrotated_layers) == [i for i, has in enumerate(getattr(theirs, "no_rope_layers", [1] * 8)) if not has]
    for key in shape:
        raw = {"model_type": name, **shape}
        del raw[key]
        (tmp_path / "config.json").write_text(json.dumps(raw))
        with pytest.raises(UserError, match=f"config.json: missing '{key}'"):
            read_model_config(tmp_path)


# ---- refusals ------------------------------------------------------------------------------------------------------


def _lose(name: str) -> Callable[[Path], None]:
    def lose(folder: Path) -> None:
        tensors = load_file(folder / FILE)
        del tensors[name]
        save_file(tensors, folder / FILE)

    return lose


def _put(name: str, tensor: Tensor) -> Callable[[Path], None]:
    return lambda folder: save_file(load_file(folder / FILE) | {name: tensor}, folder / FILE)


def _say(**keys: Any) -> Callable[[Path], Any]:
    return lambda folder: change(folder, **keys)


def _lose_a_shard(folder: Path) -> None:
    sharded(folder)
    next(folder.glob("model-00002*")).unlink()


DAMAGED: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no key": ("llama", _lose("model.layers.1.self_attn.k_proj.weight"), r"missing tensor model\.layers\.1\.self_attn\.k_proj"),
    "no gate": (
        "qwen3",
        _lose("model.layers.0.mlp.gate_proj.weight"),
        r"missing tensor model\.layers\.0\.mlp\.gate_proj\.weight",
    ),
    "no norm": ("olmo2", _lose("model.norm.weight"), r"missing tensor model\.norm\.weight"),
    "no head": (
        "mistral",
        _lose("lm_head.weight"),
        r"missing tensor lm_head\.weight, .*tie_word_embeddings .* is false: set it",
    ),
    "tied, it says": ("llama", _say(tie_word_embeddings=True), "the head is not the embedding: set it to false"),
    "another head": ("qwen2", _put("lm_head.weight", torch.ones(61, 36)), "the head is not the embedding"),
    "a smaller head": ("qwen2", _put("lm_head.weight", torch.ones(60, 36)), "the head is not the embedding"),
    "no shard": ("llama", _lose_a_shard, r"model-00002-of-.*: no such file, yet the index beside it names it"),
    "fewer words": ("llama", _say(vocab_size=50), "vocab_size in config.json is 50, yet model.embed_tokens.weight has 61 rows"),
    "more words": (
        "smollm3",
        _say(vocab_size=70),
        "vocab_size in config.json is 70, yet model.embed_tokens.weight has 61 rows",
    ),
    "other heads": ("llama", _say(num_key_value_heads=3), r"k_proj\.weight .*has shape \(12, 36\), expected \(18, 36\)"),
    "another MLP": ("mistral", _say(intermediate_size=51), r"gate_proj\.weight .*has shape \(52, 36\), expected \(51, 36\)"),
    "another width": ("olmo2", _say(hidden_size=24), r"has shape \(61, 36\), expected \(61, 24\) by config.json"),
    "fewer layers": (
        "qwen3",
        _say(num_hidden_layers=2, layer_types=None),
        "unexpected tensor model.layers.2.input_layernorm.weight",
    ),
    "more layers": ("llama", _say(num_hidden_layers=4), "missing tensor model.layers.3.input_layernorm.weight"),
    "a bias": ("llama", _put("model.layers.0.mlp.up_proj.bias", torch.ones(52)), "unexpected tensor .*up_proj.bias"),
    "no floats": ("llama", _put("model.norm.weight", torch.ones(36, dtype=torch.int32)), r"model\.norm\.weight .*has dtype"),
    "bytes": (
        "llama",
        _put("model.layers.0.mlp.up_proj.weight", torch.ones(52, 36, dtype=torch.uint8)),
        r"up_proj\.weight .*has dtype",
    ),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_weights_that_do_not_fit_are_refused_by_name(how: str, tmp_path: Path) -> None:
    name, damage, message = DAMAGED[how]
    saved(name, tmp_path / "start")
    damage(tmp_path / "start")
    for form in ("hf", "megarewarm"):
        with pytest.raises(UserError, match=message) as found:
            to(form, tmp_path / "start", tmp_path / "out")
        assert "\n" not in str(found.value) and str(tmp_path / "start") in str(found.value)
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


def test_layers_that_gpt_neox_does_not_have_are_not_written_for_it(tmp_path: Path) -> None:
    saved("qwen3", tmp_path / "start")
    with pytest.raises(UserError, match=r"model\.\w+: GPT-NeoX has nothing like it \(family 'qwen3'\); export to hf"):
        to("neox", tmp_path / "start", tmp_path / "out")
    assert not (tmp_path / "out").exists()
