"""What GPT-NeoX calls the parameters of its own and of Llama-like models, and in which order their rows lie in its files.

Names are ``N.rest``; N counts the modules of GPT-NeoX's sequence: the embedding 0, layers from 2 on, the last norm L + 3, the
head L + 4. Its SwiGLU is one matrix in each rank's part, the half without the activation first; up to 2024 there were two, w1
(the gate) and w3. With grouped queries each rank's part has all its queries, then keys, then values (pull request 1315);
before, beside w1 and w3, each query head was followed by its share of the rows of the keys and of the values. Without grouped
queries the rows are head by head, as here.
"""

from __future__ import annotations

import re

from megarewarm.checkpoint.foreign.tensor_parts import Arrangement
from megarewarm.config.model import ModelConfig
from megarewarm.errors import UserError
from megarewarm.model.parameters import EMBEDDING, HEAD, Card

_IGNORED = re.compile(r"(rotary_emb\.inv_freq|attention\.bias|attention\.masked_bias|_extra_state)$")
_PIECE = "/"
# today's names first, which are those that are written
_NEOX = [("mlp.linear1.", "mlp.dense_h_to_4h."), ("mlp.linear2.", "mlp.dense_4h_to_h."), ("norm.", "final_layer_norm.")]
_LLAMA = [
    ("input_layernorm.scale", "attention_norm.weight"),
    ("post_attention_layernorm.scale", "mlp_norm.weight"),
    ("norm.scale", "final_layer_norm.weight"),
    ("mlp.linear1.", "mlp.gate_up."),
    ("mlp.linear2.", "mlp.down."),
    ("mlp.dense_h_to_4h.", "mlp.gate_up."),
    ("mlp.dense_4h_to_h.", "mlp.down."),
    ("mlp.w1.weight", f"mlp.gate_up.weight{_PIECE}0"),
    ("mlp.w3.weight", f"mlp.gate_up.weight{_PIECE}1"),
    ("mlp.w2.", "mlp.down."),
]
_OUTSIDE = {"word_embeddings.weight": EMBEDDING, "final_linear.weight": HEAD}


def is_first_norm(key: str) -> bool:
    """Whether ``key`` is that of the first norm of a layer, which every layer has."""
    return key.endswith(("input_layernorm.weight", "input_layernorm.scale"))


def whole_of(piece: str) -> str:
    """The parameter here of which a stored one is a piece."""
    return piece.partition(_PIECE)[0]


def piece_name(name: str, layers: int, *, llama: bool) -> str | None:
    """megarewarm's name of stored parameter ``N.rest``, with a mark where it is a piece of one here (``whole_of``); None for a
    buffer. ``llama``: the model is Llama-like."""
    if _IGNORED.search(name):
        return None
    number, _, rest = name.removeprefix("sequential.").partition(".")
    if name.startswith("tied_modules.embed."):
        number, rest = "0", name.removeprefix("tied_modules.embed.")
    if not number.isdecimal():
        raise UserError(f"'{name}' is not a parameter of a GPT-NeoX model")
    position = int(number)
    if rest in _OUTSIDE:
        return _OUTSIDE[rest]
    ours = next((our + rest.removeprefix(their) for their, our in (_LLAMA if llama else _NEOX) if rest.startswith(their)), rest)
    if rest.startswith("norm."):
        return ours
    if 2 <= position < layers + 2:
        return f"layers.{position - 2}.{ours}"
    raise UserError(f"'{name}' is not a parameter of a GPT-NeoX model with {layers} layers")


def stored_name(name: str, config: ModelConfig) -> tuple[int, str]:
    """(number of the layer file, today's name in it) of our parameter ``name``: the inverse of ``piece_name``."""
    for theirs, ours in _OUTSIDE.items():
        if name == ours:
            return (0 if name == EMBEDDING else config.num_layers + 4), theirs
    inside = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    file, rest = (int(inside[1]) + 2, inside[2]) if inside else (config.num_layers + 3, name)
    table = _NEOX if config.norm == "layer" else _LLAMA
    return file, next((their + rest.removeprefix(our) for their, our in table if rest.startswith(our)), rest)


def arrangement_of(card: Card, config: ModelConfig, *, old: bool = False) -> Arrangement | None:
    """How the rows of a parameter of ``config`` lie in a rank's part of a file; None where they lie as here. ``old``: in files
    with w1 and w3."""
    if config.norm == "layer" or card.interleaved is None or (card.by_head and config.queries_per_key == 1):
        return None
    if not card.by_head:
        return Arrangement(card.interleaved, (1, 0))
    share = config.head_width // config.queries_per_key if old else None
    return Arrangement(card.interleaved, (0, 1, 2), share)
