"""Initial weights. Each parameter has a generator of its own, so its values depend on the seed and its name alone."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from megarewarm.config.schema import ModelConfig
from megarewarm.model.neox import NeoX

_WRITES_TO_RESIDUAL = ("attention.dense.weight", "mlp.dense_4h_to_h.weight")


def initialize(model: NeoX, seed: int) -> None:
    """Fill every parameter of ``model`` as its config says. Rows of a padded vocabulary become zero.

    Neither the order of the parameters, nor the device, nor the dtype, nor the padding changes the values drawn.
    """
    vocabulary = model.config.vocab_size
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            padded = name in ("embed_in.weight", "embed_out.weight")
            shape = (vocabulary, *parameter.shape[1:]) if padded else tuple(parameter.shape)
            parameter[vocabulary if padded else len(parameter) :].zero_()
            parameter[: shape[0]].copy_(initial_value(name, shape, model.config, seed))


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """The whole parameter ``name`` at the start, fp32 on the CPU: biases 0, norms 1 and 0, weights from a normal.

    A sharded layout draws the whole and keeps its part.
    """
    if name.endswith("bias"):
        return torch.zeros(shape)
    if name.endswith("layernorm.weight") or name == "final_layer_norm.weight":
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, standard_deviation(name, config), generator=generator)


def standard_deviation(name: str, config: ModelConfig) -> float:
    """Standard deviation of the weight ``name``.

    small: sqrt(2 / 5h) (arXiv 1910.05895); wang: 2 / (L sqrt(h)) (GPT-J); scaled_normal: init_std / sqrt(2L) (GPT-2).
    """
    h, layers = config.hidden_size, config.num_layers
    if not name.endswith(_WRITES_TO_RESIDUAL):
        return math.sqrt(2 / (5 * h)) if config.init == "small" else config.init_std
    if config.output_init == "wang":
        return 2 / (layers * math.sqrt(h))
    return config.init_std / math.sqrt(2 * layers) if config.output_init == "scaled_normal" else config.init_std
