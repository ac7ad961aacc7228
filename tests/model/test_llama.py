"""Llama and its relatives against transformers' models: logits, loss and every gradient; fused and plain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from megarewarm.checkpoint.foreign.families import model_type_of_family
from megarewarm.checkpoint.foreign.huggingface import read_model_config
from megarewarm.model.fused import Operations, fuse
from megarewarm.model.parameters import cards
from megarewarm.model.transformer import Transformer
from tests.support.families import CONFIGS, VOCABULARY, saved
from tests.support.huggingface import load_weights


def pair(name: str, folder: Path, operations: Operations | None = None) -> tuple[Transformer, PreTrainedModel]:
    theirs = saved(name, folder)
    config, notes = read_model_config(folder)
    assert notes == []
    ours = Transformer(config)
    if operations is not None:
        fuse(ours, operations)
    load_weights(folder, ours)
    return ours, theirs


def gradients_under_their_names(model: Transformer) -> dict[str, Tensor]:
    kind, every = model_type_of_family(model.config), cards(model.config)
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        interleaved = every[name].interleaved
        parts = [parameter.grad] if interleaved is None else interleaved.split(parameter.grad)
        found |= dict(zip(kind.stored(name), parts, strict=True))
    return found


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_those_of_transformers(name: str, fused: bool, tmp_path: Path) -> None:
    operations = Operations(norms="triton", gelu="triton") if fused else None
    ours, theirs = pair(name, tmp_path, operations)
    tokens = torch.randint(0, VOCABULARY, (2, 29), generator=torch.Generator().manual_seed(3))
    wanted = theirs(tokens, use_cache=False).logits
    torch.testing.assert_close(ours.logits(tokens), wanted, rtol=0, atol=2e-6 * float(wanted.detach().abs().max()))
    F.cross_entropy(wanted[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    loss, count = ours.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert int(count) == 56
    found = gradients_under_their_names(ours)
    every = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert found.keys() == every.keys()
    for name, gradient in every.items():
        assert gradient is not None
        # keys' biases move all scores of a query alike: what remains of their gradients is rounding
        largest = max(float(gradient.abs().max()), 0.05)
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("name", CONFIGS)
def test_documents_are_as_if_each_stood_by_itself(name: str, tmp_path: Path) -> None:
    ours, theirs = pair(name, tmp_path, Operations(norms="triton", gelu="triton"))
    documents = [torch.randint(0, VOCABULARY, (1, length)) for length in (11, 1, 9)]
    starts = torch.cat([torch.full((1, d.shape[1]), first) for d, first in zip(documents, (0, 11, 12), strict=True)], 1)
    found = F.linear(ours(torch.cat(documents, 1), starts), ours.head)
    wanted = torch.cat([theirs(document, use_cache=False).logits for document in documents], 1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6 * float(wanted.detach().abs().max()))
