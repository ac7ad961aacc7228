"""Initial weights. Each parameter has its own generator, so its values depend only on the seed and its name."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from megarewarm.config.model import ModelConfig
from megarewarm.model.parameters import Card, cards
from megarewarm.model.transformer import Transformer


def initialize(model: Transformer, seed: int) -> None:
    """Fill every parameter of ``model`` as its config says. Rows of a padded vocabulary become zero. The values don't depend
    on the order of the parameters, the device, the dtype, or the padding."""
    every = cards(model.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rows = every[name].shape[0]
            parameter[rows:].zero_()
            parameter[:rows].copy_(initial_value(every[name], model.config, seed))


def initial_value(card: Card, config: ModelConfig, seed: int) -> Tensor:
    """The whole parameter at the start, fp32 on the CPU: biases 0, norms 1 and 0, weights from a normal. A sharded layout
    draws the whole and keeps its part."""
    if card.initial in ("zeros", "ones"):
        return torch.full(card.shape, float(card.initial == "ones"))
    generator = generator_of(seed, card.name)
    return torch.empty(card.shape).normal_(0.0, standard_deviation(card, config), generator=generator)


def generator_of(seed: int, name: str) -> torch.Generator:
    """Random numbers that depend on ``seed`` and ``name`` alone."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def standard_deviation(card: Card, config: ModelConfig) -> float:
    """Standard deviation of a weight's initial values. small: sqrt(2 / 5h) (arXiv 1910.05895); wang: 2 / (L sqrt(h))
    (GPT-J); scaled_normal: init_std / sqrt(2L) (GPT-2)."""
    h, layers = config.hidden_size, config.num_layers
    if card.initial == "normal":
        return math.sqrt(2 / (5 * h)) if config.init == "small" else config.init_std
    if config.output_init == "wang":
        return 2 / (layers * math.sqrt(h))
    return config.init_std / math.sqrt(2 * layers) if config.output_init == "scaled_normal" else config.init_std
