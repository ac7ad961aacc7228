"""What a parameter is: a card for each of a model, which everything else reads instead of guessing from names.

How large it is, what it does, how tensor ranks share it, how it starts and whether it decays: optimizers, layouts, initial
weights, sizes, costs and the readers of foreign checkpoints ask here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from types import MappingProxyType
from typing import Literal

from megarewarm.config.schema import ModelConfig

EMBEDDING, HEAD = "embed_in.weight", "embed_out.weight"

SHAPE_KEYS = ("num_layers", "hidden_size", "num_heads", "mlp_size", "vocab_size", "tie_embeddings", "attention_bias")
"""The fields of ``ModelConfig`` that two models must share for one to take the other's parameters."""
FUNCTION_KEYS = ("activation", "residual", "rotary_fraction", "rotary_base", "layernorm_eps")
"""Those that leave the shapes alone and change what is computed."""

Role = Literal["embedding", "head", "norm", "bias", "inner", "outer"]
Initial = Literal["zeros", "ones", "normal", "output"]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What is true of a parameter in every layer of every model.

    ``role``: ``inner`` matrices read the residual stream, ``outer`` ones write to it; weights and biases of LayerNorms are
    ``norm``. ``sizes``: of its dimensions, h (hidden), f (MLP) and v (vocabulary), or multiples. ``divided``: the dimension
    that tensor ranks share; None where each holds it whole. ``initial``: see ``initialize.initial_value``.
    """

    role: Role
    sizes: tuple[str, ...]
    divided: int | None = None
    initial: Initial = "normal"

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices, embedding and head among them, not to norms and biases, as in GPT-NeoX."""
        return self.role not in ("norm", "bias")

    @property
    def is_matrix(self) -> bool:
        """Whether it is a weight of a linear layer within the model: neither a table of the vocabulary nor a vector."""
        return self.role in ("inner", "outer")

    @property
    def has_vocabulary(self) -> bool:
        """Whether its rows are the vocabulary's."""
        return self.role in ("embedding", "head")

    @property
    def by_head(self) -> bool:
        """Whether its rows are, head by head, those of the query, the key and the value."""
        return self.sizes[0] == "3h"

    @property
    def is_added_after_sum(self) -> bool:
        """Whether it is the bias of an ``outer`` matrix: tensor ranks sum what the matrix gives, and add it once."""
        return self.role == "bias" and self.divided is None


@dataclass(frozen=True, kw_only=True)
class Card(Kind):
    """A parameter of one model. ``name`` and ``shape`` are those on a single device; ``layer`` counts from 0, None outside."""

    name: str
    shape: tuple[int, ...]
    layer: int | None

    @property
    def numel(self) -> int:
        """Its number of values."""
        return prod(self.shape)

    @property
    def group(self) -> str:
        """The part of the model that it belongs to: 'embed_in', 'layers.0', ..., 'final_layer_norm' or 'embed_out'."""
        return self.name.split(".")[0] if self.layer is None else f"layers.{self.layer}"


_NORM = {"weight": Kind(role="norm", sizes=("h",), initial="ones"), "bias": Kind(role="norm", sizes=("h",), initial="zeros")}
_LAYER = {
    "input_layernorm.weight": _NORM["weight"],
    "input_layernorm.bias": _NORM["bias"],
    "post_attention_layernorm.weight": _NORM["weight"],
    "post_attention_layernorm.bias": _NORM["bias"],
    "attention.query_key_value.weight": Kind(role="inner", sizes=("3h", "h"), divided=0),
    "attention.query_key_value.bias": Kind(role="bias", sizes=("3h",), divided=0, initial="zeros"),
    "attention.dense.weight": Kind(role="outer", sizes=("h", "h"), divided=1, initial="output"),
    "attention.dense.bias": Kind(role="bias", sizes=("h",), initial="zeros"),
    "mlp.dense_h_to_4h.weight": Kind(role="inner", sizes=("f", "h"), divided=0),
    "mlp.dense_h_to_4h.bias": Kind(role="bias", sizes=("f",), divided=0, initial="zeros"),
    "mlp.dense_4h_to_h.weight": Kind(role="outer", sizes=("h", "f"), divided=1, initial="output"),
    "mlp.dense_4h_to_h.bias": Kind(role="bias", sizes=("h",), initial="zeros"),
}
_BEFORE = {EMBEDDING: Kind(role="embedding", sizes=("v", "h"), divided=0)}
_AFTER = {
    "final_layer_norm.weight": _NORM["weight"],
    "final_layer_norm.bias": _NORM["bias"],
    HEAD: Kind(role="head", sizes=("v", "h"), divided=0),
}
_IN_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


def kind_of(name: str) -> Kind:
    """What is true of parameter ``name`` in every model. Raises ``KeyError`` for a name that no model has."""
    inside = _IN_LAYER.fullmatch(name)
    return _LAYER[inside[2]] if inside else {**_BEFORE, **_AFTER}[name]


@lru_cache(maxsize=64)
def cards(config: ModelConfig) -> Mapping[str, Card]:
    """The card of every parameter by its name, in the order of ``model.neox.NeoX``."""
    h = config.hidden_size
    sizes = {"h": h, "3h": 3 * h, "f": config.mlp_size, "v": config.vocab_size}

    def made(kinds: Mapping[str, Kind], layer: int | None = None) -> Iterator[Card]:
        for name, kind in kinds.items():
            whole = name if layer is None else f"layers.{layer}.{name}"
            yield Card(**vars(kind), name=whole, shape=tuple(sizes[size] for size in kind.sizes), layer=layer)

    bare = () if config.attention_bias else ("attention.query_key_value.bias", "attention.dense.bias")
    in_layer = {name: kind for name, kind in _LAYER.items() if name not in bare}
    after = {name: kind for name, kind in _AFTER.items() if name != HEAD or not config.tie_embeddings}
    every = [*made(_BEFORE), *(card for i in range(config.num_layers) for card in made(in_layer, i)), *made(after)]
    return MappingProxyType({card.name: card for card in every})
