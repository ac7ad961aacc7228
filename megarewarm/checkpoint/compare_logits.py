"""How far the logits of two models differ, in float64 and with one layer in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megarewarm.checkpoint.weights import Weights
from megarewarm.config.model import ModelConfig
from megarewarm.data.files.token_file import open_tokens
from megarewarm.errors import UserError
from megarewarm.model.initialize import generator_of
from megarewarm.model.parameters import EMBEDDING, HEAD
from megarewarm.model.positions import positions_of
from megarewarm.model.transformer import NORMS, make_layer

Model = tuple[Weights, ModelConfig]

_LONGEST = 512
_BLOCK = 2**20
"""Values of a head that are in float64 at a time."""


@dataclass(frozen=True)
class SampleTokens:
    """``ids`` (b, s) int64, ``where`` they are from in words; ``real``: of a text, so that a loss on them means something."""

    ids: Tensor
    where: str
    real: bool


def sample_tokens(prefix: str | None, config: ModelConfig, count: int, seed: int = 0) -> SampleTokens:
    """About ``count`` ids in sequences of the model's positions, 512 at most: of the token file ``prefix``, evenly spaced, or
    random ones. Raises ``UserError`` for a file that is empty, or has ids beyond the vocabulary of the model."""
    length = min(config.max_positions, _LONGEST, max(count, 2))
    rows = max(1, count // length)
    if prefix is None:
        ids = torch.randint(config.vocab_size, (rows, length), generator=generator_of(seed, "tokens"))
        return SampleTokens(ids, f"{ids.numel():,} random ids", real=False)
    file = open_tokens(prefix, vocab_size=config.vocab_size)
    file.check_vocabulary(config.vocab_size)
    if file.total_tokens < 2:
        raise UserError(f"{prefix}: holds {file.total_tokens} tokens; at least 2 are needed to compare logits")
    length = min(length, file.total_tokens)
    starts = np.linspace(0, file.total_tokens - length, rows).astype(np.int64)
    ids = torch.from_numpy(np.stack([file.read(int(start), length) for start in starts]).astype(np.int64))
    return SampleTokens(ids, f"{ids.numel():,} tokens of {prefix}", real=True)


@dataclass(frozen=True)
class LogitsDifference:
    """``largest`` |difference| of two logits; ``scale``: root mean square of the first model's. ``losses``: mean cross entropy
    of both on the next tokens. ``new_mass``: the share of the softmax that rows of the second have which the first lacks."""

    tokens: SampleTokens
    largest: float
    scale: float
    losses: tuple[float, float]
    new_mass: float = 0.0

    def line(self) -> str:
        """For people."""
        loss = "; loss {:.4f} before, {:.4f} after".format(*self.losses) if self.tokens.real else ""
        far = f"differ by {self.largest:.2g} at most, their root mean square is {self.scale:.3g}"
        return f"logits on {self.tokens.where} {far}{loss}"


@torch.no_grad()
def compare(one: Model, other: Model, tokens: SampleTokens) -> LogitsDifference:
    """The two models on the same tokens, computed in float64 from the weights as they are. The second may have more rows of the
    vocabulary, which count in its loss only. A value that is not finite makes ``largest`` NaN."""
    hidden = [_hidden(*model, tokens.ids) for model in (one, other)]
    heads = [weights.read(EMBEDDING if config.tie_embeddings else HEAD) for weights, config in (one, other)]
    sums = [_RunningLoss(tokens.ids[:, 1:].flatten()) for _ in heads]
    rows = one[1].vocab_size
    largest, squares = torch.zeros((), dtype=torch.float64), 0.0
    step = max(1, _BLOCK // max(head.shape[1] for head in heads))
    for first in range(0, rows, step):
        block = slice(first, min(first + step, rows))
        before, after = (F.linear(x, head[block].double()) for x, head in zip(hidden, heads, strict=True))
        largest = torch.maximum(largest, (before - after).abs().max())
        squares += float(before.square().sum())
        for loss, logits in zip(sums, (before, after), strict=True):
            loss.add(first, logits[:, :-1].flatten(0, 1))
    common = sums[1].total
    for first in range(rows, len(heads[1]), step):
        sums[1].add(first, F.linear(hidden[1][:, :-1].flatten(0, 1), heads[1][first : first + step].double()))
    scale = sqrt(squares / (tokens.ids.numel() * rows))
    mass = float(1 - (common - sums[1].total).exp().mean())
    return LogitsDifference(tokens, float(largest), scale, (sums[0].mean, sums[1].mean), mass)


class _RunningLoss:
    """Cross entropy of ``targets`` (t,) from logits that come in blocks of the vocabulary."""

    def __init__(self, targets: Tensor) -> None:
        self._targets = targets
        self.total = torch.full(targets.shape, -torch.inf, dtype=torch.float64)
        self._chosen = torch.zeros(targets.shape, dtype=torch.float64)

    def add(self, first: int, logits: Tensor) -> None:
        """(t, rows) float64: of the rows that begin with ``first``."""
        self.total = torch.logaddexp(self.total, logits.logsumexp(1))
        here = (self._targets >= first) & (self._targets < first + logits.shape[1])
        picked = logits.gather(1, (self._targets - first).clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        self._chosen = torch.where(here, picked, self._chosen)

    @property
    def mean(self) -> float:
        return float((self.total - self._chosen).mean())


def _hidden(weights: Weights, config: ModelConfig, ids: Tensor) -> Tensor:
    """(b, s) to the (b, s, h) float64 that the head reads."""
    x: Tensor = weights.read(EMBEDDING)[ids].double()
    positions = positions_of(ids.shape[1], config, x)
    for i in range(config.num_layers):
        with torch.device("meta"):
            layer = make_layer(config, i)
        x = _filled(layer, weights, f"layers.{i}.")(x, positions)
    norm = NORMS[config.norm](config.hidden_size, eps=config.layernorm_eps)
    normed: Tensor = _filled(norm, weights, "final_layer_norm.")(x)
    return normed


def _filled(module: nn.Module, weights: Weights, prefix: str) -> nn.Module:
    module = module.double().to_empty(device="cpu")
    for name, parameter in module.named_parameters():
        parameter.copy_(weights.read(prefix + name))
    return module
