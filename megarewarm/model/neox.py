"""The layers of GPT-NeoX (arXiv 2204.06745) as plain PyTorch on one device. Parallelism is applied to them from outside.
Parameters are called as in Hugging Face's GPTNeoXForCausalLM, without its ``gpt_neox.`` prefix."""

from __future__ import annotations

from typing import NamedTuple

from megarewarm_kernels import attention
from torch import Tensor, nn
from torch.nn import functional as F

from megarewarm.config.model import ModelConfig
from megarewarm.model.given_bias import waiting_bias
from megarewarm.model.positions import Positions


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
        self.head_dim, self.planes = config.head_width, config.rotary_dims // 2
        self.group, self.window = 1, None
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
            bias=waiting_bias(self.query_key_value),
            backend=self.backend,
            deterministic=self.deterministic,
        )
        return self.dense(context)

    def normed(self, qkv: Tensor) -> Tensor:
        """(b, s, 3 n d) as they are."""
        return qkv


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


class DeferredResidual(NamedTuple):
    """A residual stream to which two parts have yet to be added: the next layer does so where it reads them (fused.py).
    ``biases``: those in the parts that wait for who adds them to give them their gradients."""

    x: Tensor
    attn_out: Tensor
    mlp_out: Tensor
    biases: tuple[Tensor | None, Tensor | None] = (None, None)
