"""Llama-like checkpoints of GPT-NeoX: read from files that index arithmetic made of transformers' models, and written back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, PreTrainedModel

from megarewarm.checkpoint.export.neox import export_neox
from megarewarm.checkpoint.foreign.huggingface import HuggingFaceWeights
from megarewarm.checkpoint.foreign.neox_folder import NeoXFolder
from megarewarm.checkpoint.foreign.neox_names import arrangement_of, piece_name, stored_name
from megarewarm.checkpoint.foreign.neox_optimizer import What
from megarewarm.checkpoint.foreign.tensor_parts import Arrangement
from megarewarm.checkpoint.source import NeoXCheckpoint, open_checkpoint
from megarewarm.checkpoint.weights import Weights
from megarewarm.config.model import ModelConfig, RotaryScaling
from megarewarm.config.neox_family import gated_width
from megarewarm.errors import UserError
from megarewarm.model.interleaved import Interleaved
from megarewarm.model.parameters import cards
from megarewarm.model.transformer import Transformer
from tests.checkpoint.test_convert import tool
from tests.support.llama_shards import Heads, Neox, neox_attention, write_neox

LAYERS, HIDDEN, QUERIES, VOCABULARY, GATE, WINDOW = 3, 36, 6, 66, 54, 7


def hf_config(keys: int, **more: Any) -> PretrainedConfig:
    shape: dict[str, Any] = {
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": QUERIES,
        "num_key_value_heads": keys,
        "intermediate_size": GATE,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }
    return (MistralConfig if "sliding_window" in more else LlamaConfig)(**shape | more)


def settings_of(config: PretrainedConfig, shape: Neox) -> dict[str, Any]:
    old = shape.names == "w"
    found: dict[str, Any] = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num-attention-heads": QUERIES,
        "num_kv_heads": config.num_key_value_heads,
        "intermediate_size": GATE if old else 3 * GATE,
        "max-position-embeddings": 64,
        "seq_length": 64,
        "pos_emb": "rotary",
        "rotary_pct": 1,
        "rotary_emb_base": 500,
        "norm": "rmsnorm",
        "rms_norm_epsilon": 1e-4,
        "gpt_j_residual": False,
        "no_weight_tying": not config.tie_word_embeddings,
        "use_bias_in_attn_linear": getattr(config, "attention_bias", False),
        "activation": "silu" if old else "swiglu",
        "model_parallel_size": shape.tensor,
        **({"mlp_type": "llama"} if old else {"use_bias_in_mlp": getattr(config, "mlp_bias", False)}),
    }
    if getattr(config, "sliding_window", None):
        found |= {"sliding_window_width": config.sliding_window - 1, "attention_config": [[["flash"], LAYERS]]}
    return found


def random_model(config: PretrainedConfig, seed: int = 1) -> PreTrainedModel:
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter) + float(parameter.dim() == 1))
    return model


def state_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def heads_of(config: PretrainedConfig) -> Heads:
    return Heads(QUERIES, config.num_key_value_heads, HIDDEN // QUERIES)


def logits_of(weights: Weights, config: ModelConfig, tokens: torch.Tensor) -> torch.Tensor:
    model = Transformer(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.read(name))
        return model.logits(tokens)


TOKENS = torch.randint(0, VOCABULARY, (2, 29), generator=torch.Generator().manual_seed(3))
CASES: dict[str, tuple[PretrainedConfig, Neox]] = {
    "1:1": (hf_config(6), Neox()),
    "1:1, 3 tensor": (hf_config(6), Neox(tensor=3)),
    "1:1, w1": (hf_config(6), Neox(tensor=2, names="w")),
    "3:1, 2 tensor": (hf_config(2), Neox(tensor=2)),
    "2:1, 3 tensor, no pipeline": (hf_config(3), Neox(tensor=3, pipe=0)),
    "6:1, tied": (hf_config(1, tie_word_embeddings=True), Neox()),
    "3:1, w1, 2 tensor": (hf_config(2), Neox(tensor=2, names="w")),
    "6:1, w1, no pipeline": (hf_config(1), Neox(pipe=0, names="w")),
    "biases": (hf_config(2, attention_bias=True, mlp_bias=True), Neox(tensor=2)),
    "window": (hf_config(3, sliding_window=WINDOW), Neox(tensor=3)),
    "window, w1": (hf_config(2, sliding_window=WINDOW), Neox(names="w")),
}


def written(place: Path, name: str) -> tuple[Path, PreTrainedModel]:
    config, shape = CASES[name]
    model = random_model(config)
    shape = Neox(shape.tensor, shape.pipe, shape.names, settings_of(config, shape))
    return write_neox(place, shape, state_of(model), heads_of(config), LAYERS), model


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers_and_the_export_is_read_back(name: str, tmp_path: Path) -> None:
    folder, theirs = written(tmp_path / "neox", name)
    source = open_checkpoint(str(folder.parent))
    config = source.model_config
    assert config.family == ("mistral" if "window" in name else "llama")
    assert config.sliding_window == (WINDOW if "window" in name else None)
    assert (config.mlp_size, config.layernorm_eps) == (GATE, 1e-4)
    assert any("until November 2024" in note for note in source.notes) == ("w1" in name and "1:1" not in name)
    with torch.no_grad():
        wanted = theirs(TOKENS, use_cache=False).logits
    torch.testing.assert_close(logits_of(source.weights, config, TOKENS), wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))
    for ranks in {1, config.kv_heads}:
        export_neox(source.stored, config, tmp_path / f"again{ranks}", tensor_ranks=ranks)
        again = NeoXFolder(tmp_path / f"again{ranks}" / "global_step0")
        assert again.model_config == config
        assert all(torch.equal(again.read(each), source.stored.read(each)) for each in cards(config))


@pytest.mark.parametrize("name", ["1:1, 3 tensor", "3:1, 2 tensor", "biases", "6:1, tied", "window"])
def test_what_we_write_is_what_the_other_writer_writes(name: str, tmp_path: Path) -> None:
    folder, _ = written(tmp_path / "theirs", name)
    source = NeoXFolder(folder)
    export_neox(source, source.model_config, tmp_path / "ours", tensor_ranks=CASES[name][1].tensor)
    files = sorted(file.name for file in folder.glob("layer_*"))
    assert files == sorted(file.name for file in (tmp_path / "ours/global_step0").glob("layer_*"))
    for file in files:
        one, two = (torch.load(place / file, weights_only=True) for place in (folder, tmp_path / "ours/global_step0"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), file
    read = yaml.safe_load((tmp_path / "ours/global_step0/configs/model.yml").read_text())
    assert gated_width(read) == GATE and read["norm"] == "rmsnorm" and read["activation"] == "swiglu"


@pytest.mark.parametrize(("name", "data"), [("3:1, 2 tensor", 3), ("3:1, w1, 2 tensor", 1), ("biases", 2), ("1:1, w1", 2)])
def test_moments_and_masters_are_laid_out_like_weights(name: str, data: int, tmp_path: Path) -> None:
    config, shape = CASES[name]
    shape = Neox(shape.tensor, shape.pipe, shape.names, settings_of(config, shape))
    models = [random_model(config, seed) for seed in (1, 2, 3, 4)]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / f"hf{number}")
    states = [state_of(model) for model in models]
    folder = write_neox(tmp_path / "neox", shape, states[0], heads_of(config), LAYERS, (states[1], states[2], states[3]), data)
    source = open_checkpoint(str(folder))
    assert isinstance(source, NeoXCheckpoint) and source._optimizer is not None and source.training is not None
    assert (source.training.step, source.training.optimizer_step) == (7, 6)
    stored, *others = (HuggingFaceWeights(tmp_path / f"hf{number}") for number in range(4))
    whats: tuple[What, ...] = ("exp_avg", "exp_avg_sq", "master")
    for each in cards(source.model_config):
        assert torch.equal(source.stored.read(each), stored.read(each)), each
        for what, wanted in zip(whats, others, strict=True):
            assert torch.equal(source._optimizer.read(what, each), wanted.read(each)), (what, each)
        assert torch.equal(source.weights.read(each), others[2].read(each)), each


@pytest.mark.parametrize("name", ["3:1, w1, 2 tensor", "biases", "6:1, w1, no pipeline"])
def test_moments_without_zero_are_divided_among_the_stages(name: str, tmp_path: Path) -> None:
    config, shape = CASES[name]
    stages = 2 if shape.pipe else 1
    shape = Neox(shape.tensor, shape.pipe, shape.names, settings_of(config, shape))
    models = [random_model(config, seed) for seed in (1, 2, 3)]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / f"hf{number}")
    first, second, third = (state_of(model) for model in models)
    write_neox(tmp_path / "neox", shape, first, heads_of(config), LAYERS, (second, third, first), stages=stages)
    source = open_checkpoint(str(tmp_path / "neox"))
    assert isinstance(source, NeoXCheckpoint) and source._optimizer is not None and not source._optimizer.has_masters
    whats: tuple[What, ...] = ("exp_avg", "exp_avg_sq")
    for what, number in zip(whats, (1, 2), strict=True):
        wanted = HuggingFaceWeights(tmp_path / f"hf{number}")
        for each in cards(source.model_config):
            assert torch.equal(source._optimizer.read(what, each), wanted.read(each)), (what, each)


def test_the_tool_writes_llama_in_their_form(tmp_path: Path) -> None:
    model = random_model(hf_config(2))
    model.save_pretrained(tmp_path / "hf")
    tool("convert_checkpoint", tmp_path / "hf", tmp_path / "neox", "--to", "neox", "--tp", "2")
    tool("convert_checkpoint", tmp_path / "neox", tmp_path / "back", "--to", "hf")
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("hf", "back"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# ---- layouts -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.permutations([0, 1, 2]), st.booleans())
def test_an_arrangement_and_back_are_the_same(
    group: int, turns: int, unit: int, columns: int, order: list[int], whole: bool
) -> None:
    ours = Interleaved((group, 1, 1), unit * group)
    part = torch.arange(turns * ours.turn * columns).view(-1, columns)
    arranged = Arrangement(ours, tuple(order), None if whole else unit)
    there = arranged.to_theirs(part)
    assert torch.equal(arranged.to_ours(there), part) and torch.equal(there.sort(0).values, part)
    assert torch.equal(arranged.to_ours(there[:, 0].clone()), part[:, 0])  # biases


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_query_key_value_of_any_shape(group: int, per_rank: int, ranks: int, unit: int, old: bool) -> None:
    keys, channels = per_rank * ranks, 2 * unit * group
    heads = Heads(group * keys, keys, channels)
    q, k, v = (torch.arange(n * channels).view(-1, 1) + 10_000 * i for i, n in enumerate((heads.queries, keys, keys)))
    shape: dict[str, Any] = {"num_layers": 1, "hidden_size": heads.queries * channels, "vocab_size": 8}
    config = ModelConfig(family="llama", num_heads=heads.queries, num_kv_heads=keys, **shape)
    card = cards(config)["layers.0.attention.query_key_value.weight"]
    arranged = arrangement_of(card, config, old=old)
    assert arranged is not None and card.interleaved is not None
    parts = [arranged.to_ours(neox_attention(q, k, v, heads, rank, ranks, old=old)) for rank in range(ranks)]
    assert torch.equal(torch.cat(parts), card.interleaved.join([q, k, v]))


@pytest.mark.parametrize("family", ["neox", "llama"])
def test_names_there_and_back(family: str) -> None:
    config = ModelConfig(family=family, num_layers=3, hidden_size=32, num_heads=4, vocab_size=8)
    for name in cards(config):
        number, rest = stored_name(name, config)
        assert piece_name(f"{number}.{rest}", 3, llama=family == "llama") == name


# ---- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"activation": "geglu"}, r"activation is 'geglu'.*only a SwiGLU"),
        ({"rotary_pct": 0.5}, r"rotary_pct is 0\.5.*every channel"),
        ({"gpt_j_residual": True}, r"gpt_j_residual is True"),
        (
            {"norm": "layernorm", "activation": "gelu", "num_kv_heads": 6, "use_bias_in_mlp": True},
            r"norm is 'layernorm' by configs.*RMSNorm's",
        ),
        ({"num_kv_heads": 3}, r"num_kv_heads is 3 by configs/\*\.yml and 2 by the tensors"),
        ({"num-attention-heads": 4}, r"are not those of 4 heads with 9 channels"),
        ({"num-attention-heads": 0}, r"num_attention_heads is 0, expected a number above 0"),
        ({"use_qk_layernorm": True}, r"use_qk_layernorm is True"),
        ({"sliding_window_width": 5, "use_bias_in_mlp": True}, r"sliding_window_width is 5.*a window goes with no biases"),
        ({"norm": "te_rmsnorm"}, r"norm is 'te_rmsnorm'"),
    ],
)
def test_other_models_are_refused_in_one_line(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    config, shape = hf_config(2), Neox(tensor=2)
    shape = Neox(2, settings=settings_of(config, shape) | changes)
    folder = write_neox(tmp_path, shape, state_of(random_model(config)), heads_of(config), LAYERS)
    with pytest.raises(UserError, match=says) as caught:
        NeoXFolder(folder)
    assert "\n" not in str(caught.value)


def test_without_settings_the_heads_are_not_guessed(tmp_path: Path) -> None:
    config = hf_config(2)
    folder = write_neox(tmp_path, Neox(), state_of(random_model(config)), heads_of(config), LAYERS)
    with pytest.raises(UserError, match="nothing in it says how many heads"):
        NeoXFolder(folder)
    content = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True)
    torch.save(content | {"args": {"num_attention_heads": QUERIES}}, folder / "mp_rank_00_model_states.pt")
    found = NeoXFolder(folder)
    assert found.model_config.num_kv_heads == 2 and any("rms_norm_epsilon 1e-5" in note for note in found.notes)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"family": "qwen2"}, "model.output_bias"),
        ({"family": "qwen3"}, "model.qk_norm"),
        ({"family": "olmo2"}, "model.norm_place"),
        ({"family": "smollm3", "unrotated_layers": (1,)}, "model.unrotated_layers"),
        ({"family": "smollm3", "sliding_window": 4, "window_layers": (1,)}, "model.window_layers"),
        ({"family": "llama", "head_dim": 10}, "model.head_dim"),
        ({"family": "llama", "rotary_scaling": RotaryScaling(kind="linear", factor=2.0)}, "model.rotary_scaling"),
        ({"family": "llama", "rotary_base": 0.5}, "model.rotary_base 0.5"),
        ({"family": "llama", "num_kv_heads": 1}, "--tp 2: the 1 heads of keys can't be shared"),
    ],
)
def test_what_gpt_neox_can_not_hold_is_refused(values: dict[str, Any], says: str, tmp_path: Path) -> None:
    shape: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": 8, "ffn_size": 24}
    config = ModelConfig(**shape | values)
    with pytest.raises(UserError, match=says) as caught:
        export_neox(_Fresh(config), config, tmp_path / "out", tensor_ranks=2)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


class _Fresh:
    """A model's first weights."""

    where = "fresh"

    def __init__(self, config: ModelConfig) -> None:
        self._parameters = dict(Transformer(config).named_parameters())

    def describe(self) -> Any:
        from megarewarm.checkpoint.weights import Description

        return {name: Description(tuple(p.shape), p.dtype, name) for name, p in self._parameters.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._parameters[name].detach()
