"""GPT-NeoX (arXiv 2204.06745) as plain PyTorch on one device. Parallelism is applied to it from outside.

Parameters are called as in Hugging Face's GPTNeoXForCausalLM, without its ``gpt_neox.`` prefix.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from megarewarm_kernels import linear_cross_entropy
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megarewarm.config.schema import ModelConfig

LOSS_MEMORY = 64 * 2**20


class NeoX(nn.Module):
    """Token ids to logits, or to the summed loss. Has no buffers: it may be built on the meta device.

    ``padded_vocab_size`` rows are allocated for the embedding and the head where a layout needs them; the rows past
    ``config.vocab_size`` are in no softmax. ``loss_memory`` is the bytes that logits may take (see linear_cross_entropy).
    Weights are whatever nn.Linear and nn.Embedding draw: call ``initialize`` or load a checkpoint.
    """

    def __init__(self, config: ModelConfig, padded_vocab_size: int | None = None, loss_memory: int = LOSS_MEMORY) -> None:
        super().__init__()
        rows = padded_vocab_size or config.vocab_size
        if rows < config.vocab_size:
            raise ValueError(f"padded_vocab_size {rows} is below vocab_size {config.vocab_size}")
        self.config = config
        self.loss_memory = loss_memory
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
        positions = positions_of(tokens.shape[1], self.config, tokens.device, starts)
        for layer in self.layers:
            x = layer(x, positions)
        return self.final_layer_norm(x)

    def logits(self, tokens: Tensor) -> Tensor:
        """(b, s) token ids to (b, s, v) logits, padded rows cut off. For inspection: training uses ``loss``."""
        return F.linear(self(tokens), self.head[: self.config.vocab_size])

    def loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy summed over tokens, and how many there were.

        ``inputs`` and ``targets`` are (b, s) int64; targets of -100 are left out. Returns an fp32 and an int64 scalar.
        """
        hidden = self(inputs)
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            self.head,
            targets.flatten(),
            valid_rows=self.config.vocab_size,
            memory_budget=self.loss_memory,
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
        attended = self.attention(self.input_layernorm(x), positions)
        if self.parallel:
            return x + attended + self.mlp(self.post_attention_layernorm(x))
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Causal attention. ``query_key_value`` has, head by head, the rows of the query, the key and the value."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.attention_bias)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """(b, s, h) to (b, s, h). The number of heads follows from the width of the projection."""
        qkv = rotate(self.query_key_value(x.flatten(0, 1)), positions, self.head_dim)
        query, key, value = qkv.view(*x.shape[:2], -1, 3, self.head_dim).transpose(1, 2).unbind(3)  # (b, n, s, d) each
        mask = positions.mask
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        return self.dense(context.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a GELU between them: the tanh approximation or the exact one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.mlp_size)
        self.dense_4h_to_h = nn.Linear(config.mlp_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate=self.approximate))


class Positions(NamedTuple):
    """``cos``, ``sin``: (s, r / 2) or, where documents begin anew, (b, s, r / 2), fp32. ``mask``: (b, 1, s, s), true where a
    position attends to another; None for what causality alone says."""

    cos: Tensor
    sin: Tensor
    mask: Tensor | None


def positions_of(length: int, config: ModelConfig, device: torch.device, starts: Tensor | None = None) -> Positions:
    """Cosines and sines of position x frequency (arXiv 2104.09864), and the mask of documents that begin at ``starts`` (b, s).

    Computed at every forward, some thousand numbers: a buffer would be lost on the meta device and cast by ``.to``.
    """
    dims, base = config.rotary_dims, config.rotary_base
    frequencies = 1.0 / base ** (torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims)
    place = torch.arange(length, device=device)
    if starts is None:
        angles = place.float()[:, None] * frequencies
        return Positions(angles.cos(), angles.sin(), None)
    angles = (place - starts).float()[..., None] * frequencies
    mask = (place <= place[:, None]) & (place >= starts[..., None])
    return Positions(angles.cos(), angles.sin(), mask[:, None])


def rotate(qkv: Tensor, positions: Positions, head_dim: int) -> Tensor:
    """Turn queries and keys by their positions, in place: channels (i, i + r / 2) of a head are a point in a plane.

    ``qkv`` is (t, n x 3 x d), t = b x s, and must be nobody else's: a projection's output, which its derivative does
    not need. Computed in fp32 where qkv is of lower precision.
    """
    cos, sin, _ = positions
    return qkv if cos.shape[-1] == 0 else _Rotate.apply(qkv, cos, sin, head_dim)


class _Rotate(torch.autograd.Function):
    """In place both ways. The gradient is rotated where it lies too: it is the one that the split of qkv has made."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
        ctx.tables, ctx.head_dim = (cos, sin), head_dim
        ctx.mark_dirty(qkv)
        return _turn(qkv, cos, sin, head_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.tables
        return _turn(grad, cos, -sin, ctx.head_dim), None, None, None


def _turn(qkv: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    (length, half), heads = cos.shape[-2:], qkv.shape[1] // (3 * head_dim)
    query_key = qkv.view(-1, length, heads, 3, head_dim)[..., :2, :]
    first, second = query_key[..., :half], query_key[..., half : 2 * half]
    cos, sin = cos[..., None, None, :], sin[..., None, None, :]
    turned = first * cos - second * sin
    second.copy_(second * cos + first * sin)
    first.copy_(turned)
    return qkv
