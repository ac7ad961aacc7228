"""Cards of parameters, against the model itself and against DeepSpeed's and Megatron's rules written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megarewarm.config.model import ModelConfig
from megarewarm.model.parameters import cards, kind_of
from megarewarm.model.transformer import Transformer

CONFIG = ModelConfig(num_layers=3, hidden_size=24, num_heads=3, ffn_size=40, vocab_size=17, rotary_fraction=0.5)


def test_roles_are_what_the_modules_do() -> None:
    with torch.device("meta"):
        model = Transformer(CONFIG)
    every = cards(CONFIG)
    seen = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            card = every[f"{path}.{name}"]
            seen.add(card.name)
            assert card.shape == tuple(parameter.shape) and card.numel == parameter.numel()
            assert (card.role == "norm") == isinstance(module, nn.LayerNorm)
            assert card.decays == (name == "weight" and not isinstance(module, nn.LayerNorm))
            assert card.has_vocabulary == (17 in card.shape)
            assert card.is_matrix == (isinstance(module, nn.Linear) and name == "weight" and card.layer is not None)
            if card.is_matrix:  # what writes to the residual stream is divided along what it reads
                assert card.role == ("outer" if path.endswith(("attention.dense", "4h_to_h")) else "inner")
                assert card.divided == (1 if card.role == "outer" else 0)
            assert card.group == ".".join(card.name.split(".")[: 2 if card.layer is not None else 1])
            assert vars(kind_of(card.name)).items() <= vars(card).items()
    assert seen == set(every)


@pytest.mark.parametrize("name", ["lm_head.weight", "layers.x.mlp.dense_h_to_4h.weight", "layers.0.mlp.gate.weight", ""])
def test_a_name_that_no_model_has(name: str) -> None:
    with pytest.raises(KeyError):
        kind_of(name)
