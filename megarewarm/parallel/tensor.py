"""Tensor parallelism (arXiv 1909.08053), applied to a model from outside: its parts are replaced by ones that hold a share.

Heads, MLP columns and vocabulary rows are divided; what a layer of each kind does is in tensor_neox.py and tensor_llama.py.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from megarewarm.config.model import ModelConfig
from megarewarm.errors import UserError
from megarewarm.model import llama, neox
from megarewarm.model.parameters import cards
from megarewarm.model.transformer import Transformer
from megarewarm.parallel.placement import place
from megarewarm.parallel.tensor_llama import shard_layer
from megarewarm.parallel.tensor_neox import ShardedLayer
from megarewarm.parallel.tensor_ranks import TensorRanks


def check(config: ModelConfig, sequence_length: int, ranks: int, sequence: bool) -> None:
    """Raise ``UserError`` naming the number to change if ``ranks`` can't share the model."""
    heads = ("num_heads", config.num_heads) if config.queries_per_key == 1 else ("num_kv_heads", config.kv_heads)
    for key, value in (heads, ("ffn_size", config.mlp_size)):
        if value % ranks:
            raise UserError(
                f"parallel.tensor: {ranks} ranks can't share model.{key} {value} evenly; choose a divisor of {value}"
            )
    if ranks > config.vocab_size:
        raise UserError(f"parallel.tensor: {ranks} ranks for a vocabulary of {config.vocab_size}; choose fewer")
    if sequence and sequence_length % ranks:
        raise UserError(
            f"parallel.sequence: {ranks} tensor ranks can't share data.sequence_length {sequence_length} evenly; choose a "
            f"divisor of {sequence_length} for parallel.tensor or set parallel.sequence to false"
        )


def shard(model: Transformer, ranks: TensorRanks) -> None:
    """Replace the parts of ``model`` (on the meta device) by their shares. Parameter names stay, padded rows are added."""
    model.embed_in = ShardedEmbedding(model.embed_in, ranks)  # type: ignore[assignment]
    for i, layer in enumerate(model.layers):
        if isinstance(layer, neox.Layer):
            model.layers[i] = ShardedLayer(layer, ranks)
        else:
            assert isinstance(layer, llama.LlamaLayer)
            shard_layer(layer, ranks)
    every = cards(model.config)
    for module_name, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            full = f"{module_name}.{name}".removeprefix(".")
            placement = place(every[full], ranks.rank, ranks.size, ranks.sequence)
            setattr(module, name, nn.Parameter(parameter.new_empty(placement.local_shape)))


class ShardedEmbedding(nn.Module):
    """Rows of the vocabulary: ids of other ranks give zero, so the sum over ranks is each id's row."""

    def __init__(self, embedding: nn.Embedding, ranks: TensorRanks) -> None:
        super().__init__()
        self.weight = embedding.weight
        self.ranks = ranks

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.weight.shape[0]
        local = tokens - self.ranks.rank * rows
        elsewhere = (local < 0) | (local >= rows)
        found = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.ranks.leave(found.masked_fill(elsewhere[..., None], 0))
