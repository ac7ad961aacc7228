"""What a parameter is: a card for each of a model, which everything else reads instead of guessing from names.

How large it is, what it does, how tensor ranks share it, how it starts and whether it decays: optimizers, layouts, initial
weights, sizes, costs and the readers of foreign checkpoints ask here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from types import MappingProxyType
from typing import Literal

from megarewarm.config.model import ModelConfig
from megarewarm.model.interleaved import Interleaved

EMBEDDING, HEAD = "embed_in.weight", "embed_out.weight"

SHAPE_KEYS = {
    "family": "family",
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "head_width": "head_dim",
    "mlp_size": "ffn_size",
    "vocab_size": "vocab_size",
    "tie_embeddings": "tie_embeddings",
    "attention_bias": "attention_bias",
    "attention_output_bias": "output_bias",
    "mlp_bias": "mlp_bias",
}
"""What two models must share for one to take the other's parameters: attributes of ``ModelConfig``, and the key of each."""
FUNCTION_KEYS = (
    "activation",
    "residual",
    "rotary_fraction",
    "rotary_base",
    "rotary_scaling",
    "unrotated_layers",
    "sliding_window",
    "window_layers",
    "layernorm_eps",
)
"""Those that leave the shapes alone and change what is computed."""

Role = Literal["embedding", "head", "norm", "bias", "inner", "outer"]
Initial = Literal["zeros", "ones", "normal", "output"]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What is true of a parameter in every layer of every model.

    ``role``: ``inner`` matrices read the residual stream, ``outer`` ones write to it; weights and biases of norms are ``norm``.
    ``sizes``: of its dimensions, h (hidden), f (MLP), v (vocabulary), d (a head), q and k (all heads of queries, of keys), qkv,
    or 2f. ``divided``: the dimension that tensor ranks share; None where each holds it whole. ``feeds_share``: it is whole on
    every rank, yet used for the rank's share of the work, so its gradients are summed. ``initial``: see
    ``initialize.initial_value``.
    """

    role: Role
    sizes: tuple[str, ...]
    divided: int | None = None
    feeds_share: bool = False
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
        """Whether its rows are, key head by key head, those of its queries, its key and its value."""
        return self.sizes[0] == "qkv"

    @property
    def is_added_after_sum(self) -> bool:
        """Whether it is the bias of an ``outer`` matrix: tensor ranks sum what the matrix gives, and add it once."""
        return self.role == "bias" and self.divided is None


@dataclass(frozen=True, kw_only=True)
class Card(Kind):
    """A parameter of one model. ``name`` and ``shape`` are those on a single device; ``layer`` counts from 0, None outside.
    ``interleaved``: how several matrices lie in it; None for one."""

    name: str
    shape: tuple[int, ...]
    layer: int | None
    interleaved: Interleaved | None = None

    @property
    def numel(self) -> int:
        """Its number of values."""
        return prod(self.shape)

    @property
    def group(self) -> str:
        """The part of the model that it belongs to: 'embed_in', 'layers.0', ..., 'final_layer_norm' or 'embed_out'."""
        return self.name.split(".")[0] if self.layer is None else f"layers.{self.layer}"


_SCALE = Kind(role="norm", sizes=("h",), initial="ones")
_SHIFT = Kind(role="norm", sizes=("h",), initial="zeros")
_SHARED = {"weight": replace(_SCALE, feeds_share=True), "bias": replace(_SHIFT, feeds_share=True)}
_ATTENTION = {
    "attention.query_key_value.weight": Kind(role="inner", sizes=("qkv", "h"), divided=0),
    "attention.query_key_value.bias": Kind(role="bias", sizes=("qkv",), divided=0, initial="zeros"),
    "attention.dense.weight": Kind(role="outer", sizes=("h", "q"), divided=1, initial="output"),
    "attention.dense.bias": Kind(role="bias", sizes=("h",), initial="zeros"),
}
_NEOX_LAYER = {
    "input_layernorm.weight": _SHARED["weight"],
    "input_layernorm.bias": _SHARED["bias"],
    "post_attention_layernorm.weight": _SHARED["weight"],
    "post_attention_layernorm.bias": _SHARED["bias"],
    **_ATTENTION,
    "mlp.dense_h_to_4h.weight": Kind(role="inner", sizes=("f", "h"), divided=0),
    "mlp.dense_h_to_4h.bias": Kind(role="bias", sizes=("f",), divided=0, initial="zeros"),
    "mlp.dense_4h_to_h.weight": Kind(role="outer", sizes=("h", "f"), divided=1, initial="output"),
    "mlp.dense_4h_to_h.bias": Kind(role="bias", sizes=("h",), initial="zeros"),
}
_LLAMA_LAYER = {
    "attention_norm.weight": _SCALE,
    **_ATTENTION,
    "mlp_norm.weight": _SCALE,
    "mlp.gate_up.weight": Kind(role="inner", sizes=("2f", "h"), divided=0),
    "mlp.gate_up.bias": Kind(role="bias", sizes=("2f",), divided=0, initial="zeros"),
    "mlp.down.weight": Kind(role="outer", sizes=("h", "f"), divided=1, initial="output"),
    "mlp.down.bias": Kind(role="bias", sizes=("h",), initial="zeros"),
}
_HEAD_NORMS = {
    f"attention.{which}_norm.weight": Kind(role="norm", sizes=("d",), initial="ones", feeds_share=True)
    for which in ("query", "key")
}
_WIDTH_NORMS = {
    f"attention.{which}_norm.weight": Kind(role="norm", sizes=(size,), initial="ones", divided=0)
    for which, size in (("query", "q"), ("key", "k"))
}
_BEFORE = {EMBEDDING: Kind(role="embedding", sizes=("v", "h"), divided=0)}
_AFTER = {
    "final_layer_norm.weight": _SCALE,
    "final_layer_norm.bias": _SHIFT,
    HEAD: Kind(role="head", sizes=("v", "h"), divided=0),
}
_IN_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


def kind_of(name: str) -> Kind:
    """What is true of parameter ``name`` of a GPT-NeoX or Llama-like model. Raises ``KeyError`` for a name that none has, and
    for those whose kind depends on the model."""
    inside = _IN_LAYER.fullmatch(name)
    return (_NEOX_LAYER | _LLAMA_LAYER)[inside[2]] if inside else {**_BEFORE, **_AFTER}[name]


def _in_layer(config: ModelConfig) -> dict[str, Kind]:
    """The parameters of a layer, in the order of its modules."""
    if config.norm == "layer":
        kinds = dict(_NEOX_LAYER)
    else:
        norms = {"none": {}, "head": _HEAD_NORMS, "width": _WIDTH_NORMS}[config.qk_norm]
        kinds = {}
        for name, kind in _LLAMA_LAYER.items():
            if name == "mlp_norm.weight":
                kinds |= norms
            kinds[name] = kind
    without = {
        "attention.query_key_value.bias": not config.attention_bias,
        "attention.dense.bias": not config.attention_output_bias,
        "mlp.gate_up.bias": not config.mlp_bias,
        "mlp.down.bias": not config.mlp_bias,
    }
    return {name: kind for name, kind in kinds.items() if not without.get(name)}


@lru_cache(maxsize=64)
def cards(config: ModelConfig) -> Mapping[str, Card]:
    """The card of every parameter by its name, in the order of ``model.transformer.Transformer``."""
    d = config.head_width
    q, k, f = config.num_heads * d, config.kv_heads * d, config.mlp_size
    sizes = {"h": config.hidden_size, "d": d, "q": q, "k": k, "qkv": q + 2 * k, "f": f, "2f": 2 * f, "v": config.vocab_size}
    several = {"qkv": Interleaved((config.queries_per_key, 1, 1), d), "2f": Interleaved((1, 1), 1)}

    def made(kinds: Mapping[str, Kind], layer: int | None = None) -> Iterator[Card]:
        for name, kind in kinds.items():
            whole = name if layer is None else f"layers.{layer}.{name}"
            shape = tuple(sizes[size] for size in kind.sizes)
            yield Card(**vars(kind), name=whole, shape=shape, layer=layer, interleaved=several.get(kind.sizes[0]))

    in_layer = _in_layer(config)
    left_out = {HEAD} if config.tie_embeddings else set()
    if config.norm == "rms":
        left_out.add("final_layer_norm.bias")
    after = {name: kind for name, kind in _AFTER.items() if name not in left_out}
    every = [*made(_BEFORE), *(card for i in range(config.num_layers) for card in made(in_layer, i)), *made(after)]
    return MappingProxyType({card.name: card for card in every})
