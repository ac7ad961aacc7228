"""Sizes, costs and initial weights against the module itself, FLOP counting and saved tensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megarewarm.config.load import read_configs
from megarewarm.config.model import ModelConfig
from megarewarm.model.fused import Operations, fuse
from megarewarm.model.initialize import initialize
from megarewarm.model.parameters import cards
from megarewarm.model.size import (
    activation_bytes,
    count_parameters,
    peak_tflops,
    training_flops_per_token,
)
from megarewarm.model.transformer import Transformer
from tests.support.family_shapes import SHAPES, larger, shape

ROOT = Path(__file__).resolve().parents[2]
# totals and totals without embeddings as published with Pythia (arXiv 2304.01373, table 1 and its model cards)
PYTHIA = {
    "14m": (14_067_712, 1_189_888),
    "70m": (70_426_624, 18_915_328),
    "160m": (162_322_944, 85_056_000),
    "410m": (405_334_016, 302_311_424),
    "1b": (1_011_781_632, 805_736_448),
    "1.4b": (1_414_647_808, 1_208_602_624),
}


@pytest.mark.parametrize("name", PYTHIA)
def test_presets_have_pythias_sizes(name: str) -> None:
    mapping, _ = read_configs([str(ROOT / "configs" / "pythia" / f"{name}.yml")])
    config = ModelConfig(**mapping["model"])
    tables = sum(card.numel for card in cards(config).values() if card.has_vocabulary)
    assert (count_parameters(config), count_parameters(config) - tables) == PYTHIA[name]


@given(
    layers=st.integers(1, 4),
    heads=st.integers(1, 4),
    dim=st.sampled_from([4, 8]),
    ffn=st.one_of(st.none(), st.integers(1, 40)),
    vocabulary=st.integers(2, 50),
    tied=st.booleans(),
    bias=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_parameters_are_counted_as_the_module_has_them(
    layers: int, heads: int, dim: int, ffn: int | None, vocabulary: int, tied: bool, bias: bool
) -> None:
    config = ModelConfig(
        num_layers=layers,
        hidden_size=heads * dim,
        num_heads=heads,
        ffn_size=ffn,
        vocab_size=vocabulary,
        rotary_fraction=0.5,
        tie_embeddings=tied,
        attention_bias=bias,
    )
    with torch.device("meta"):
        model = Transformer(config)
    assert [(name, card.shape) for name, card in cards(config).items()] == [
        (name, tuple(parameter.shape)) for name, parameter in model.named_parameters()
    ]
    assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


def test_flops_are_those_that_pytorch_counts() -> None:
    """PyTorch counts attention's whole squares; ours counts the causal half, so the other half is added back."""
    config = ModelConfig(num_layers=3, hidden_size=64, num_heads=4, vocab_size=97)
    model = Transformer(config)
    b, s = 2, 32
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        torch.nn.functional.linear(model(torch.zeros((b, s), dtype=torch.int64)), model.head).sum().backward()
    other_half = 6.0 * config.num_layers * config.hidden_size * s * b * s
    assert counter.get_total_flops() == training_flops_per_token(config, s) * b * s + other_half


def saved_bytes(model: Transformer, what: Any, b: int, s: int) -> int:
    """Bytes of all storages that autograd keeps of (b, s) tokens, each once, and of the result: neither parameters nor
    autocast's copies of them."""
    from megarewarm.parallel.recompute import recompute

    for layer in model.layers:
        recompute(layer, what)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {parameter.shape for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        copied = tensor.dtype is torch.bfloat16 and bool({tensor.shape, tensor.shape[::-1]} & shapes)
        if storage.data_ptr() not in own and tensor.is_floating_point() and not copied:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model(torch.zeros((b, s), dtype=torch.int64))
    return sum(storages.values()) + (hidden.nbytes if hidden.untyped_storage().data_ptr() not in storages else 0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"residual": "sequential"},
        {"num_heads": 2, "hidden_size": 96},
        {"ffn_size": 128, "rotary_fraction": 1.0},
        {"attention_bias": False, "num_layers": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize(("b", "s"), [(1, 64), (4, 32)])
@pytest.mark.parametrize("recompute_what", ["none", "selective", "full"])
def test_activations_are_those_that_are_saved(changes: dict[str, Any], b: int, s: int, recompute_what: Any) -> None:
    usual = {"num_layers": 3, "hidden_size": 64, "num_heads": 4, "vocab_size": 50}
    config = ModelConfig(**(usual | changes))
    model = Transformer(config)
    held = saved_bytes(model, recompute_what, b, s)
    assert activation_bytes(config, b * s, recompute=recompute_what) == pytest.approx(held, rel=0.05)


@pytest.mark.parametrize("what", ["none", "selective", "full"])
@pytest.mark.parametrize("residual", ["parallel", "sequential"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_activations_under_autocast(fused: bool, residual: str, what: Any) -> None:
    """Fused layers with the parallel residual pass on a rounded stream, also to the last norm; the first one gets it exact."""
    config = ModelConfig(num_layers=3, hidden_size=64, num_heads=4, vocab_size=50, residual=residual)
    model = Transformer(config)
    if fused:
        fuse(model, Operations(norms="triton", gelu="triton"))
    with torch.autocast("cpu", torch.bfloat16):
        held = saved_bytes(model, what, 4, 32)
    first = 128 * 64 * 2 if what == "full" and fused and residual == "parallel" else 0
    expected = activation_bytes(config, 128, recompute=what, fused=fused, work_bytes=2)
    assert expected + first == pytest.approx(held, rel=0.05)


# ---- Llama's relatives --------------------------------------------------------------------------------------------------


# totals of the safetensors files that Hugging Face's pages of these models state
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "Meta-Llama-3-8B": (
        8_030_261_248,
        dict(family="llama", hidden_size=4096, num_kv_heads=8, ffn_size=14336, vocab_size=128256),
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        dict(family="mistral", hidden_size=4096, num_kv_heads=8, ffn_size=14336, vocab_size=32000),
    ),
    "OLMo-2-1124-7B": (7_298_617_344, dict(family="olmo2", hidden_size=4096, ffn_size=11008, vocab_size=100352)),
    "Qwen2-0.5B": (
        494_032_768,
        dict(family="qwen2", num_layers=24, hidden_size=896, num_heads=14, num_kv_heads=2, ffn_size=4864, vocab_size=151936)
        | {"tie_embeddings": True},
    ),
    "Qwen3-0.6B": (
        596_049_920,
        dict(family="qwen3", num_layers=28, hidden_size=1024, num_heads=16, num_kv_heads=8, ffn_size=3072, vocab_size=151936)
        | {"tie_embeddings": True, "head_dim": 128},
    ),
    "SmolLM3-3B": (
        3_075_098_624,
        dict(family="smollm3", num_layers=36, hidden_size=2048, num_heads=16, num_kv_heads=4, ffn_size=11008, vocab_size=128256)
        | {"tie_embeddings": True},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_sizes(name: str) -> None:
    total, keys = PUBLISHED[name]
    assert count_parameters(ModelConfig(**({"num_layers": 32, "num_heads": 32} | keys))) == total


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_of_every_family_are_counted(name: str) -> None:
    config = ModelConfig(**shape(name, 3))
    with torch.device("meta"):
        model = Transformer(config)
    found = [(key, tuple(parameter.shape)) for key, parameter in model.named_parameters()]
    assert [(key, card.shape) for key, card in cards(config).items()] == found
    assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_flops_of_every_family_are_those_that_pytorch_counts(name: str) -> None:
    """PyTorch counts attention's whole squares; ours the pairs of each window."""
    config = ModelConfig(**shape(name, 3))
    model, b, s = Transformer(config), 2, 16
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        torch.nn.functional.linear(model(torch.zeros((b, s), dtype=torch.int64)), model.head).sum().backward()
    unseen = 0.0
    for layer in range(3):
        window = min(config.window_of(layer) or s, s)
        unseen += s * s - sum(min(i + 1, window) for i in range(s)) + window / 2
    rest = 12.0 * config.num_heads * config.head_width * unseen * b
    assert counter.get_total_flops() == pytest.approx(training_flops_per_token(config, s) * b * s + rest, rel=1e-12)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("what", ["none", "selective", "full"])
@pytest.mark.parametrize("name", SHAPES)
def test_activations_of_every_family_are_those_that_are_saved(name: str, what: Any, fused: bool) -> None:
    config = ModelConfig(**larger(name))
    model, b, s = Transformer(config), 4, 16
    if fused:
        fuse(model, Operations(norms="triton", gelu="triton"))
    held = saved_bytes(model, what, b, s)
    expected = activation_bytes(config, b * s, recompute=what, fused=fused)
    assert expected == pytest.approx(held, rel=0.05)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", SHAPES)
def test_activations_of_every_family_under_autocast(name: str, fused: bool) -> None:
    config = ModelConfig(**larger(name))
    model, b, s = Transformer(config), 7, 16
    if fused:
        fuse(model, Operations(norms="triton", gelu="triton"))
    with torch.autocast("cpu", torch.bfloat16):
        held = saved_bytes(model, "none", b, s)
    assert activation_bytes(config, b * s, fused=fused, work_bytes=2) == pytest.approx(held, rel=0.05)


def test_known_gpus_have_a_peak() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989 and peak_tflops("NVIDIA A100-SXM4-80GB") == 312
    assert peak_tflops("Voodoo 2") is None


def test_initial_weights_have_the_spread_they_should() -> None:
    shape = {"num_layers": 6, "hidden_size": 128, "num_heads": 4, "vocab_size": 500}
    for settings_, inner, outer in [
        ({}, math.sqrt(2 / (5 * 128)), 2 / (6 * math.sqrt(128))),
        ({"init": "normal", "init_std": 0.05, "output_init": "scaled_normal"}, 0.05, 0.05 / math.sqrt(12)),
        ({"init": "normal", "init_std": 0.01, "output_init": "normal"}, 0.01, 0.01),
    ]:
        model = Transformer(ModelConfig(**shape, **settings_))
        initialize(model, 1)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                assert not parameter.any()
            elif "norm" in name:
                assert bool((parameter == 1).all())
            else:
                expected = outer if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")) else inner
                # six standard errors of a sample's deviation
                assert float(parameter.std()) == pytest.approx(expected, rel=6 / math.sqrt(2 * parameter.numel())), name
                assert abs(float(parameter.mean())) < 6 * expected / math.sqrt(parameter.numel())


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    shape = {"hidden_size": 32, "num_heads": 2, "vocab_size": 61}
    small, large = (
        Transformer(ModelConfig(num_layers=2, **shape)),
        Transformer(ModelConfig(num_layers=2, **shape), padded_vocab_size=64),
    )
    initialize(small, 4)
    initialize(large, 4)
    wide = dict(large.named_parameters())
    for name, parameter in small.named_parameters():
        assert torch.equal(wide[name][: len(parameter)], parameter)
        assert not wide[name][len(parameter) :].any()
    other = Transformer(ModelConfig(num_layers=2, **shape))
    initialize(other, 5)
    assert not torch.equal(other.embed_in.weight, small.embed_in.weight)
    layers: Any = small.layers
    assert not torch.equal(layers[0].mlp.dense_h_to_4h.weight, layers[1].mlp.dense_h_to_4h.weight)
