"""What a fused Llama-like layer does not keep for the backward pass."""

from __future__ import annotations

import weakref
from typing import Literal

import pytest
import torch
from torch import Tensor

from megarewarm.config.model import ModelConfig
from megarewarm.model import fused_llama
from megarewarm.model.computed_again import computed_again
from megarewarm.model.fused import Operations, fuse
from megarewarm.model.transformer import Transformer
from megarewarm.parallel.recompute import recompute
from tests.support.family_shapes import larger

MODEL = ModelConfig(**larger("qwen2", layers=2))


def gradients(model: Transformer) -> list[Tensor]:
    tokens = torch.arange(2 * 9).view(2, 9) % MODEL.vocab_size
    return list(torch.autograd.grad(model.loss(tokens[:, :-1], tokens[:, 1:])[0], list(model.parameters())))


@pytest.mark.parametrize("what", ["none", "selective", "full"])
def test_swiglus_result_is_freed_and_computed_once_again(
    what: Literal["none", "selective", "full"], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    model = Transformer(MODEL)
    wanted = gradients(model)
    fuse(model, Operations(norms="triton", gelu="triton"))
    for layer in model.layers:
        recompute(layer, what)
    results: list[weakref.ref[Tensor]] = []

    def watched(pairs: Tensor) -> Tensor:
        result = swiglu(pairs)
        results.append(weakref.ref(result))
        return result

    swiglu = fused_llama.swiglu
    monkeypatch.setattr(fused_llama, "swiglu", watched)
    tokens = torch.arange(2 * 9).view(2, 9) % MODEL.vocab_size
    loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
    assert len(results) == len(model.layers) and all(result() is None for result in results)
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert len(results) == 2 * len(model.layers)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_only_the_value_itself_is_computed_again() -> None:
    source, weight = torch.rand(3, 4, requires_grad=True), torch.rand(4, 4, requires_grad=True)
    value = source.exp()
    asked: list[Tensor] = []

    def again(x: Tensor) -> Tensor:
        asked.append(x)
        return x.exp()

    with computed_again(value, again, source):
        result = (value.flatten(0, 0) @ weight).square() @ weight
    plain = (source.exp() @ weight).square() @ weight
    for mine, theirs in zip(*(torch.autograd.grad(y.sum(), [source, weight]) for y in (result, plain)), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert len(asked) == 1 and asked[0].data_ptr() == source.data_ptr()
