"""A decoder on one device: embedding, layers of its family, last norm, head. Parallelism is applied to it from outside."""

from __future__ import annotations

from megarewarm_kernels import give_bias_gradients, linear_cross_entropy
from torch import Tensor, nn
from torch.nn import functional as F

from megarewarm.config.model import ModelConfig
from megarewarm.model import llama, neox
from megarewarm.model.positions import positions_of

LOSS_MEMORY = 64 * 2**20
"""Bytes that logits may take by default (see linear_cross_entropy)."""

NORMS: dict[str, type[nn.LayerNorm] | type[llama.RMSNorm]] = {"layer": nn.LayerNorm, "rms": llama.RMSNorm}
"""By ``ModelConfig.norm``."""


class Transformer(nn.Module):
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
        self.layers = nn.ModuleList(make_layer(config, i) for i in range(config.num_layers))
        self.final_layer_norm = NORMS[config.norm](config.hidden_size, eps=config.layernorm_eps)
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
        return self.from_embeddings(self.embed_in(tokens), tokens.shape[1], starts)

    def from_embeddings(self, x: Tensor, length: int, starts: Tensor | None = None) -> Tensor:
        """The same from the (b, s, h) embeddings of tokens; ``length``: s, also where ``x`` is a rank's part of a sequence."""
        positions = positions_of(length, self.config, x, starts)
        for layer in self.layers:
            x = layer(x, positions)
        return last_normed(self.final_layer_norm, x)

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


def make_layer(config: ModelConfig, number: int) -> nn.Module:
    """Layer ``number`` of a model, counted from 0: residual stream and positions to residual stream."""
    return neox.Layer(config) if config.norm == "layer" else llama.layer(config, number)


Stream = Tensor | neox.DeferredResidual | llama.DeferredSum
"""The residual stream between two layers."""


def add_deferred(x: Stream) -> Tensor:
    """The stream as one tensor."""
    if isinstance(x, neox.DeferredResidual):
        return give_bias_gradients(x.x + x.attn_out + x.mlp_out, *x.biases)
    return x if isinstance(x, Tensor) else x.x + x.out


def last_normed(norm: nn.Module, x: Stream) -> Tensor:
    """The stream after the last layer, normed; a fused ``norm`` adds its parts itself."""
    normed: Tensor = norm(x if getattr(norm, "adds_parts", False) else add_deferred(x))
    return normed
