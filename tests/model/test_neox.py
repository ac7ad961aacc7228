"""The model against transformers' GPTNeoXForCausalLM: same weights, same logits, same gradients, for every option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from megarewarm.config.model import ModelConfig
from megarewarm.model.initialize import initialize
from megarewarm.model.transformer import Transformer

SHAPE: dict[str, Any] = {"num_layers": 3, "hidden_size": 64, "num_heads": 4, "vocab_size": 61, "max_positions": 32}
VARIANTS: dict[str, dict[str, Any]] = {
    "pythia": {},
    "exact_gelu": {"activation": "gelu_erf"},
    "sequential": {"residual": "sequential"},
    "sequential_tied_no_bias": {"residual": "sequential", "tie_embeddings": True, "attention_bias": False},
    "tied": {"tie_embeddings": True},
    "no_attention_bias": {"attention_bias": False},
    "whole_rotary": {"rotary_fraction": 1.0},
    "half_rotary_other_base": {"rotary_fraction": 0.5, "rotary_base": 500.0},
    "narrow_mlp_large_eps": {"ffn_size": 80, "layernorm_eps": 1e-2},
    "one_head": {"num_heads": 1, "rotary_fraction": 0.5},
}


def transformers_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> GPTNeoXForCausalLM:
    """The peer with the same shape; its own random weights."""
    settings = GPTNeoXConfig(  # type: ignore[call-arg]
        num_hidden_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_size,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_positions,
        hidden_act="gelu" if config.activation == "gelu_erf" else "gelu_pytorch_tanh",
        use_parallel_residual=config.residual == "parallel",
        tie_word_embeddings=config.tie_embeddings,
        attention_bias=config.attention_bias,
        layer_norm_eps=config.layernorm_eps,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": config.rotary_base,
            "partial_rotary_factor": config.rotary_fraction,
        },
        attn_implementation="eager",
        bos_token_id=0,
        eos_token_id=0,
    )
    model: Any = GPTNeoXForCausalLM(settings)
    return model.to(dtype)


def pair(changes: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Transformer, GPTNeoXForCausalLM]:
    """Both models with equal random weights, none of them zero or one."""
    config = ModelConfig(**(SHAPE | changes))
    torch.manual_seed(1)
    ours, theirs = Transformer(config).to(dtype), transformers_model(config, dtype)
    named = their_parameters(theirs)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.normal_(0, 0.3)
            named[name].copy_(parameter)
    return ours, theirs


def their_parameters(model: GPTNeoXForCausalLM) -> dict[str, Tensor]:
    """By our names."""
    return {
        name.removeprefix("gpt_neox.").replace("lm_head.", "embed_out."): parameter
        for name, parameter in model.named_parameters()
    }


def some_tokens(config: ModelConfig) -> Tensor:
    return torch.randint(config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_every_gradient_equal_transformers(changes: dict[str, Any]) -> None:
    ours, theirs = pair(changes)
    tokens = some_tokens(ours.config)
    expected = theirs(tokens[:, :-1]).logits
    torch.testing.assert_close(ours.logits(tokens[:, :-1]), expected, rtol=2e-5, atol=2e-5)

    loss, count = ours.loss(tokens[:, :-1], tokens[:, 1:])
    reference = torch.nn.functional.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    assert int(count) == 3 * 19 and loss.item() == pytest.approx(reference.item(), rel=1e-6)
    loss.backward()
    reference.backward()
    wanted = their_parameters(theirs)
    assert wanted.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        mine, want = parameter.grad, wanted[name].grad
        assert mine is not None and want is not None
        assert float((mine - want).norm() / want.norm().clamp_min(1e-3)) < 1e-5, name


@pytest.mark.parametrize("changes", [{}, VARIANTS["sequential_tied_no_bias"]], ids=["pythia", "sequential"])
def test_the_same_in_float64_to_float64_rounding(changes: dict[str, Any]) -> None:
    ours, theirs = pair(changes, torch.float64)
    tokens = some_tokens(ours.config)
    # the rotary tables are fp32 in both, and computed alike up to their last bit
    torch.testing.assert_close(ours.logits(tokens), theirs(tokens).logits, rtol=1e-6, atol=1e-6)


def test_without_rotary_positions_the_order_of_the_past_is_unknown() -> None:
    """transformers can't do this one. Without positions, attention sees a set: permuting the past changes nothing."""
    tokens = some_tokens(ModelConfig(**SHAPE))[:1]
    shuffled = torch.cat([tokens[:, :10].flip(1), tokens[:, 10:]], 1)
    one_layer = Transformer(ModelConfig(**(SHAPE | {"num_layers": 1, "rotary_fraction": 0.0})))
    initialize(one_layer, 3)
    torch.testing.assert_close(one_layer(tokens)[:, 10:], one_layer(shuffled)[:, 10:], rtol=1e-5, atol=1e-6)
    rotated = Transformer(ModelConfig(**(SHAPE | {"num_layers": 1})))
    initialize(rotated, 3)
    assert not torch.allclose(rotated(tokens)[:, 10:], rotated(shuffled)[:, 10:], rtol=1e-5, atol=1e-6)


def test_no_token_sees_a_later_one() -> None:
    ours, _ = pair({})
    tokens = some_tokens(ours.config)
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % ours.config.vocab_size
    before, after = ours(tokens), ours(changed)
    assert torch.equal(before[:, :12], after[:, :12]) and not torch.equal(before[:, 12], after[:, 12])


def test_rows_that_only_a_layout_needs_are_in_no_softmax() -> None:
    config = ModelConfig(**SHAPE)
    plain, padded = Transformer(config), Transformer(config, padded_vocab_size=64)
    initialize(plain, 5)
    initialize(padded, 5)
    with torch.no_grad():  # whatever lies in the padding
        padded.embed_in.weight[61:] = 9.0
        padded.head[61:] = 9.0
    tokens = some_tokens(config)
    for model in (plain, padded):
        model.loss(tokens[:, :-1], tokens[:, 1:])[0].backward()
    assert torch.equal(plain.logits(tokens), padded.logits(tokens))
    gradients = {name: parameter.grad for name, parameter in padded.named_parameters()}
    for name, parameter in plain.named_parameters():
        mine, want = gradients[name], parameter.grad
        assert mine is not None and want is not None
        torch.testing.assert_close(mine[: len(want)], want, rtol=1e-6, atol=1e-7)
        assert not mine[len(want) :].any()
    with pytest.raises(ValueError, match="padded_vocab_size 60 is below vocab_size 61"):
        Transformer(config, padded_vocab_size=60)


def test_ignored_targets_are_left_out() -> None:
    ours, _ = pair({})
    tokens = some_tokens(ours.config)
    targets = tokens[:, 1:].clone()
    targets[0] = -100
    loss, count = ours.loss(tokens[:, :-1], targets)
    rest, fewer = ours.loss(tokens[1:, :-1], tokens[1:, 1:])
    assert int(count) == int(fewer) == 38 and loss.item() == pytest.approx(rest.item(), rel=1e-6)


def test_it_can_be_built_without_memory() -> None:
    with torch.device("meta"):
        model = Transformer(ModelConfig(num_layers=44, hidden_size=6144, num_heads=64, vocab_size=50432))
    assert sum(parameter.numel() for parameter in model.parameters()) == 20_554_567_680  # GPT-NeoX-20B
    assert not list(model.buffers())


def test_autocast_keeps_logits_near() -> None:
    ours, _ = pair({})
    tokens = some_tokens(ours.config)
    exact, _ = ours.loss(tokens[:, :-1], tokens[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        near, _ = ours.loss(tokens[:, :-1], tokens[:, 1:])
    assert near.dtype == torch.float32 and near.item() == pytest.approx(exact.item(), rel=0.02) and near.item() != exact.item()
