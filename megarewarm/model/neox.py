"""GPT-NeoX (arXiv 2204.06745) as plain PyTorch on one device. Parallelism is applied to it from outside. Parameters are
called as in Hugging Face's GPTNeoXForCausalLM, without its ``gpt_neox.`` prefix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from megarewarm_kernels import attention, linear_cross_entropy
from torch import Tensor, nn
from torch.nn import functional as F

from megarewarm.config.schema import ModelConfig

LOSS_MEMORY = 64 * 2**20
"""Bytes that logits may take by default (see linear_cross_entropy)."""


class NeoX(nn.Module):
    """Token ids to logits, or to the summed loss. Has no buffers: it may be built on the meta device.

    ``padded_vocab_size`` rows are allocated for the embedding and the head where a layout needs them; the rows past
    ``config.vocab_size`` are in no softmax.
    Weights are whatever nn.Linear and nn.Embedding draw: call ``initialize`` or load a checkpoint.
    """

    def __init__(self, config: ModelConfig, padded_vocab_size: int | None = None) -> None:
        super().__init__()
        rows = padded_vocab_size or config.vocab_size
        if rows < config.vocab_size:
            raise ValueError(f"padded_vocab_size {rows} is below vocab_size {config.vocab_size}")
        self.config = config
        self.embed_in = nn.Embedding(rows, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_eps)
        self.embed_out = None if config.tie_embeddings else nn.Linear(config.hidden_size, rows, bias=False)

    @property
    def head(self) -> Tensor:
        """(v, h), the matrix that turns hidden states into logits."""
        return self.embed_in.weight if self.embed_out is None else self.embed_out.weight

    def forward(self, tokens: Tensor, starts: Tensor | None = None) -> Tensor:
        """(b, s) int64 token ids to the (b, s, h) hidden states after the final norm.

        ``starts`` (b, s) int64: the first position of the document that each position lies in. Attention and positions then
        stay within documents; None: a sequence is one.
        """
        x = self.embed_in(tokens)
        positions = positions_of(tokens.shape[1], self.config, x, starts)
        for layer in self.layers:
            x = layer(x, positions)
        return self.final_layer_norm(add_deferred(x))

    def logits(self, tokens: Tensor) -> Tensor:
        """(b, s) token ids to (b, s, v) logits, padded rows cut off. For inspection: training uses ``loss``."""
        return F.linear(self(tokens), self.head[: self.config.vocab_size])

    def loss(self, inputs: Tensor, targets: Tensor, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cross entropy summed over tokens, and how many there were. ``inputs`` and ``targets`` are (b, s) int64; targets of
        -100 are left out, ``starts`` as in ``forward``. Returns an fp32 and an int64 scalar."""
        hidden = self(inputs, starts)
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            self.head,
            targets.flatten(),
            valid_rows=self.config.vocab_size,
            memory_budget=LOSS_MEMORY,
        )


class Layer(nn.Module):
    """parallel: x + attention(norm1(x)) + mlp(norm2(x)); sequential: x += attention(norm1(x)), x += mlp(norm2(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.parallel = config.residual == "parallel"
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_eps)
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        attn_out = self.attention(self.input_layernorm(x), positions)
        if self.parallel:
            return x + attn_out + self.mlp(self.post_attention_layernorm(x))
        x = x + attn_out
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Causal attention. ``query_key_value`` has, head by head, the rows of the query, the key and the value. ``backend``,
    ``deterministic``: see megarewarm_kernels.attention.choose."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.backend, self.deterministic = "auto", False
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.attention_bias)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """(b, s, h) to (b, s, h). The number of heads follows from the width of the projection."""
        qkv = self.query_key_value(x.flatten(0, 1)).view(*x.shape[:2], -1)
        context = attention(
            qkv,
            positions.cos,
            positions.sin,
            head_dim=self.head_dim,
            starts=positions.starts,
            backend=self.backend,
            deterministic=self.deterministic,
        )
        return self.dense(context)


class MLP(nn.Module):
    """Two linear layers with a GELU between them: the tanh approximation or the exact one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.mlp_size)
        self.dense_4h_to_h = nn.Linear(config.mlp_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(self.expand(x))

    def expand(self, x: Tensor) -> Tensor:
        """(..., h) to (..., f), before the GELU."""
        return self.dense_h_to_4h(x)

    def contract(self, x: Tensor) -> Tensor:
        """(..., f) to (..., h): the GELU and what follows."""
        return self.dense_4h_to_h(F.gelu(x, approximate=self.approximate))


class Positions(NamedTuple):
    """``cos``, ``sin``: (s, r / 2) or, where positions restart in documents, (b, s, r / 2). ``starts``: (b, s) int32, the first
    position of the document that each position lies in; None if a sequence is one document."""

    cos: Tensor
    sin: Tensor
    starts: Tensor | None


def positions_of(length: int, config: ModelConfig, x: Tensor, starts: Tensor | None = None) -> Positions:
    """Cosines and sines of position x frequency (arXiv 2104.09864) on the device of ``x``: fp32, or fp64 for fp64. Computed
    at every forward, some thousand numbers: a buffer would be lost on the meta device and cast by ``.to``."""
    dims, base = config.rotary_dims, config.rotary_base
    frequencies = 1.0 / base ** (torch.arange(0, dims, 2, dtype=torch.float32, device=x.device) / dims)
    place = torch.arange(length, device=x.device)
    if starts is not None:
        place = place - starts
        starts = starts.to(torch.int32)
    angles = place.float()[..., None] * frequencies
    exact = torch.promote_types(x.dtype, torch.float32)
    return Positions(angles.cos().to(exact), angles.sin().to(exact), starts)


class DeferredResidual(NamedTuple):
    """A residual stream to which two parts have yet to be added: the next layer does so where it reads them (fused.py)."""

    x: Tensor
    attn_out: Tensor
    mlp_out: Tensor


def add_deferred(x: Tensor | DeferredResidual) -> Tensor:
    """The stream as one tensor."""
    return x.x + x.attn_out + x.mlp_out if isinstance(x, DeferredResidual) else x
